"""Convolutions and average pooling: kernels over space."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fxmerge.algebra.affine import Affine
from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.segment import Reason
from fxmerge.graph.edit import put_module
from fxmerge.operators.base import Map, Opaque, Site, Verdict


class Convolution:
    """nn.Conv1d, nn.Conv2d, nn.Conv3d with any kernel, stride, dilation, groups and zero padding."""

    def verdict(self, site: Site) -> Verdict:
        module = site.module
        if module.padding_mode != "zeros":
            return Opaque(Reason.PADDING_MODE, module.padding_mode, "padding moves to the entry of a segment as zeros only")
        if len(site.operand_shape) != len(module.kernel_size) + 2:
            return Opaque(Reason.SHAPE, f"operand of shape {site.operand_shape}", "give a batch dimension")
        return Map(self._geometry(module), "convolution")

    def affine(self, site: Site) -> Affine:
        return Affine.of(self._geometry(site.module), site.module.weight, site.module.bias)

    def unpad(self, site: Site) -> None:
        twin: Any = sharing_copy(site.module)
        twin.padding = (0,) * len(twin.kernel_size)
        put_module(site.graph, str(site.node.target), twin)

    def _geometry(self, module: Any) -> Geometry:
        axes = tuple(map(Axis.convolution, module.kernel_size, module.stride, _padding(module), module.dilation))
        return Geometry(module.in_channels, module.out_channels, axes, module.groups, module.bias is not None)


class TransposedConvolution:
    """nn.ConvTranspose1d to 3d of stride 1: a convolution with its kernel turned round. Others make an image larger: refused."""

    def verdict(self, site: Site) -> Verdict:
        module = site.module
        if any(stride != 1 for stride in module.stride):
            return Opaque(Reason.UPSAMPLING, f"transposed convolution of stride {tuple(module.stride)}")
        if len(site.operand_shape) != len(module.kernel_size) + 2:
            return Opaque(Reason.SHAPE, f"operand of shape {site.operand_shape}", "give a batch dimension")
        return Map(self._geometry(module), "convolution")

    def affine(self, site: Site) -> Affine:
        module = site.module
        blocks = module.weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
        return Affine.of(self._geometry(module), blocks.flip(tuple(range(2, blocks.dim()))), module.bias)

    def unpad(self, site: Site) -> None:
        """Padding d*(k-1) crops what a transposed convolution adds around its input."""
        twin: Any = sharing_copy(site.module)
        twin.padding = tuple(d * (k - 1) for d, k in zip(twin.dilation, twin.kernel_size, strict=True))
        twin.output_padding = (0,) * len(twin.kernel_size)
        put_module(site.graph, str(site.node.target), twin)

    def _geometry(self, module: Any) -> Geometry:
        axes = tuple(map(_turned, module.kernel_size, module.padding, module.output_padding, module.dilation))
        return Geometry(module.in_channels, module.out_channels, axes, module.groups, module.bias is not None)


def _turned(kernel: int, padding: int, output_padding: int, dilation: int) -> Axis:
    before = dilation * (kernel - 1) - padding
    return Axis.convolution(kernel, 1, (before, before + output_padding), dilation)


class AveragePool:
    """F.avg_pool1d to 3d where it is exactly a depthwise convolution: no ceil mode, and padding, if any, counted."""

    def verdict(self, site: Site) -> Verdict:
        options = site.node.kwargs
        padding = _each(options.get("padding", 0), site.dims)
        uncounted = any(padding) and not options.get("count_include_pad", True)
        if site.dims < 1 or options.get("ceil_mode") or options.get("divisor_override") or uncounted:
            return Opaque(detail="average pooling whose divisor changes at the border")
        return Map(self._geometry(site))

    def affine(self, site: Site) -> Affine:
        geometry = self._geometry(site)
        weight = torch.full(geometry.weight_shape, 1.0 / math.prod(geometry.kernel), dtype=torch.float64)
        return Affine.of(geometry, weight)

    def unpad(self, site: Site) -> None:
        site.node.kwargs = {**site.node.kwargs, "padding": 0}

    def _geometry(self, site: Site) -> Geometry:
        options, dims = site.node.kwargs, site.dims
        kernel = _each(options["kernel_size"], dims)
        padding = [(p, p) for p in _each(options.get("padding", 0), dims)]
        axes = tuple(map(Axis.convolution, kernel, _each(options.get("stride") or kernel, dims), padding, (1,) * dims))
        return Geometry(site.channels, site.channels, axes, site.channels)


def sharing_copy(module: nn.Module) -> nn.Module:
    """A second module with the same parameters, whose settings and parameter slots are its own."""
    twin = type(module).__new__(type(module))  # copy.copy refuses parametrized modules
    twin.__dict__.update(module.__dict__)
    for slot in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[slot] = dict(module.__dict__[slot])
    return twin


def _padding(module: Any) -> list[tuple[int, int]]:
    """(leading, trailing) zeros of every axis, the string spellings resolved as torch does."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in module.padding]


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
