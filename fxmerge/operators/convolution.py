"""Convolutions and average pooling: kernels over space."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxmerge.algebra.affine import Affine
from fxmerge.algebra.module import turned
from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.segment import Reason
from fxmerge.graph.edit import put_module, sharing_copy
from fxmerge.graph.resizing import nearest_factors
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
    """nn.ConvTranspose1d to 3d: a convolution with its kernel turned round, on an image with zeros between its pixels."""

    def verdict(self, site: Site) -> Verdict:
        module = site.module
        if len(site.node.args) + len(site.node.kwargs) > 1:
            return Opaque(Reason.UPSAMPLING, "output_size is given in the call", "give output_padding to the module")
        if len(site.operand_shape) != len(module.kernel_size) + 2:
            return Opaque(Reason.SHAPE, f"operand of shape {site.operand_shape}", "give a batch dimension")
        return Map(self._geometry(module), "convolution")

    def affine(self, site: Site) -> Affine:
        module = site.module
        return Affine.of(self._geometry(module), turned(module.weight, module.groups), module.bias)

    def unpad(self, site: Site) -> None:
        """Padding crops what a transposed convolution adds around its input."""
        twin: Any = sharing_copy(site.module)
        twin.padding = tuple(axis.unpadded.offset + axis.extent - 1 for axis in self._geometry(twin).axes)
        twin.output_padding = (0,) * len(twin.kernel_size)
        put_module(site.graph, str(site.node.target), twin)

    def _geometry(self, module: Any) -> Geometry:
        settings = (module.kernel_size, module.stride, module.padding, module.output_padding, module.dilation)
        axes = tuple(map(Axis.transposed, *settings))
        even = all(stride == 1 for stride in module.stride)
        return Geometry(module.in_channels, module.out_channels, axes, module.groups, module.bias is not None, even)


class Nearest:
    """F.interpolate by nearest neighbours and whole factors: every pixel repeated."""

    def verdict(self, site: Site) -> Verdict:
        factors = nearest_factors(site.node)
        return Map(self._geometry(site)) if factors is not None and len(factors) == site.dims else Opaque(detail="interpolate")

    def affine(self, site: Site) -> Affine:
        geometry = self._geometry(site)
        return Affine.of(geometry, torch.ones(geometry.weight_shape, dtype=torch.float64))

    def unpad(self, site: Site) -> None:
        return

    def _geometry(self, site: Site) -> Geometry:
        axes = tuple(map(Axis.nearest, nearest_factors(site.node) or ()))
        return Geometry(site.channels, site.channels, axes, site.channels)


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
