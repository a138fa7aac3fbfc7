"""From a geometry or an affine map to the torch module that computes it: the one builder, for timing and for rewriting.

A map that makes the image larger by u is a transposed convolution of stride u, its kernel turned round. With e the extent of the
kernel, torch's has

    offset = padding - (e - 1)      excess = e - 1 - u - 2*padding + output_padding

so padding = offset + e - 1 and output_padding = excess + 1 + u - e + 2*padding. Torch wants padding >= 0 and output_padding from 0
to u - 1. Where they are not, the image is padded by (a, b) pixels first, which adds u*a to the one and u*(a - b) to the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxmerge.algebra.affine import Affine
from fxmerge.core.geometry import Axis, Geometry, in_pad_order

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
#: Torch's layers that a map can be written into; of these, those whose weight is turned round.
TRANSPOSED: tuple[type[nn.Module], ...] = tuple(_TRANSPOSED.values())
LAYERS = frozenset((*_CONVOLUTIONS.values(), *TRANSPOSED, nn.Linear))
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLVE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Scaling(nn.Module):
    """x -> weight * x + bias, channel by channel.

    Args:
        channels: of the images.
        channels_last: whether channels are the last dimension of an image; else they are dimension 1.
        dtype, device: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.weight = nn.Parameter(torch.ones(channels, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) if self.channels_last else (-1, *(1,) * (x.dim() - 2))
        return x * self.weight.view(shape) + self.bias.view(shape)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, channels_last={self.channels_last}"


def separate_padding(geometry: Geometry) -> tuple[int, ...]:
    """What must be padded (or, negative, cropped) before the convolution, in ``F.pad``'s order; empty if it can pad itself."""
    if geometry.enlarges:
        pads: tuple[tuple[int, int], ...] = tuple(_transposed(axis)[0] for axis in geometry.axes)
        return in_pad_order(pads) if any(map(any, pads)) else ()
    return () if all(lo == hi >= 0 for lo, hi in geometry.padding) else in_pad_order(geometry.padding)


def _transposed(axis: Axis) -> tuple[tuple[int, int], int, int]:
    """(pixels to pad before, after), padding, output_padding of the transposed convolution (see the module's text)."""
    padding = axis.offset + axis.extent - 1
    spare = axis.excess + 1 + axis.up - axis.extent + 2 * padding
    steps = spare // axis.up
    before = max(0, -(padding // axis.up), -steps)
    return (before, before + steps), padding + axis.up * before, spare % axis.up


def _settings(geometry: Geometry) -> dict[str, Any]:
    """Stride, padding and so on, in the words of torch's convolutions, transposed or not."""
    shared: dict[str, Any] = {"dilation": geometry.dilation, "groups": geometry.groups}
    if geometry.enlarges:
        _, padding, spare = zip(*map(_transposed, geometry.axes), strict=True)
        return {"stride": geometry.up, "padding": padding, "output_padding": spare, **shared}
    padding = (0,) * len(geometry.axes) if separate_padding(geometry) else tuple(lo for lo, _ in geometry.padding)
    return {"stride": geometry.stride, "padding": padding, **shared}


def turned(weight: Tensor, groups: int) -> Tensor:
    """The weight (C_in, C_out/groups, *kernel) of a transposed convolution for (C_out, C_in/groups, *kernel), and the reverse."""
    blocks: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return blocks.flip(tuple(range(2, blocks.dim())))


def convolution(
    geometry: Geometry,
    *,
    bias: bool = True,
    linear: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """A torch convolution of this geometry, transposed where it makes the image larger, its weights as torch initialises them.

    It pads by itself only where :func:`separate_padding` is empty.

    Args:
        geometry: sizes.
        bias: whether it has one.
        linear: make a linear layer, which computes the same on channels last; of a pointwise geometry without groups only.
        dtype, device: of its parameters.
    """
    if linear:
        return nn.Linear(geometry.in_channels, geometry.out_channels, bias, device=device, dtype=dtype)
    kind: Any = (_TRANSPOSED if geometry.enlarges else _CONVOLUTIONS)[len(geometry.axes)]
    settings = {**_settings(geometry), "bias": bias, "device": device, "dtype": dtype}
    module: nn.Module = kind(geometry.in_channels, geometry.out_channels, geometry.kernel, **settings)
    return module


def convolution_with(affine: Affine, *, like: torch.Tensor, bias: bool = True, linear: bool = False) -> nn.Module:
    """A torch convolution that computes this map, in the dtype, on the device and in the memory format of ``like``.

    Or a linear layer, as in :func:`convolution`.
    """
    module: Any = convolution(affine.geometry, bias=bias, linear=linear, dtype=like.dtype, device="meta")
    weight = _weight(affine).to(device=like.device, dtype=like.dtype)
    weight = weight.flatten(1) if linear else weight
    if like.dim() == weight.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        weight = weight.contiguous(memory_format=torch.channels_last)
    module.weight = nn.Parameter(weight.clone())
    if bias:
        module.bias = nn.Parameter(affine.bias.to(device=like.device, dtype=like.dtype))
    made: nn.Module = module
    return made


def _weight(affine: Affine) -> Tensor:
    return turned(affine.weight, affine.geometry.groups) if affine.geometry.enlarges else affine.weight


def weight_for(affine: Affine, *, like: Tensor, transposed: bool) -> Tensor:
    """The weight of a torch module, convolution, transposed convolution or linear layer, that computes this map.

    Args:
        like: the module's weight now, whose shape, dtype, device and memory format it takes.
        transposed: whether the module is a transposed convolution; those of stride 1 do not make the image larger.
    """
    weight = (turned(affine.weight, affine.geometry.groups) if transposed else affine.weight).reshape(like.shape)
    return torch.empty_like(like, requires_grad=False).copy_(weight)


def convolved(affine: Affine, x: Tensor) -> Tensor:
    """What the map makes of an image, in the image's dtype: the module and its padding, called as functions."""
    geometry, dims = affine.geometry, len(affine.geometry.axes)
    convolve: Any = (_CONVOLVE_TRANSPOSED if geometry.enlarges else _CONVOLVE)[dims]
    padded = F.pad(x, separate_padding(geometry) or (0, 0))
    result: Tensor = convolve(padded, _weight(affine).to(x), affine.bias.to(x), **_settings(geometry))
    return result
