"""From a geometry or an affine map to the torch module that computes it: the one builder, for timing and for rewriting."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxmerge.algebra.affine import Affine
from fxmerge.core.geometry import Geometry

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def separate_padding(geometry: Geometry) -> tuple[int, ...]:
    """What must be padded (or, negative, cropped) before the convolution, in ``F.pad``'s order; empty if it can pad itself."""
    if all(lo == hi >= 0 for lo, hi in geometry.padding):
        return ()
    return tuple(amount for pair in reversed(geometry.padding) for amount in pair)


def convolution(
    geometry: Geometry,
    *,
    bias: bool = True,
    linear: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """A torch convolution of this geometry, its weights as torch initialises them.

    It pads by itself only where :func:`separate_padding` is empty.

    Args:
        geometry: sizes.
        bias: whether it has one.
        linear: make a linear layer, which computes the same on channels last; of a pointwise geometry without groups only.
        dtype, device: of its parameters.
    """
    if linear:
        return nn.Linear(geometry.in_channels, geometry.out_channels, bias, device=device, dtype=dtype)
    kind: Any = _CONVOLUTIONS[len(geometry.axes)]
    padding = 0 if separate_padding(geometry) else tuple(lo for lo, _ in geometry.padding)
    module: nn.Module = kind(
        geometry.in_channels,
        geometry.out_channels,
        geometry.kernel,
        geometry.stride,
        padding,
        geometry.dilation,
        geometry.groups,
        bias,
        device=device,
        dtype=dtype,
    )
    return module


def convolution_with(affine: Affine, *, like: torch.Tensor, bias: bool = True, linear: bool = False) -> nn.Module:
    """A torch convolution that computes this map, in the dtype, on the device and in the memory format of ``like``.

    Or a linear layer, as in :func:`convolution`.
    """
    module: Any = convolution(affine.geometry, bias=bias, linear=linear, dtype=like.dtype, device="meta")
    weight = affine.weight.to(device=like.device, dtype=like.dtype)
    weight = weight.flatten(1) if linear else weight
    if like.dim() == weight.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        weight = weight.contiguous(memory_format=torch.channels_last)
    module.weight = nn.Parameter(weight.clone())
    if bias:
        module.bias = nn.Parameter(affine.bias.to(device=like.device, dtype=like.dtype))
    made: nn.Module = module
    return made
