r"""Sizes of translation-equivariant affine maps, axis by axis, and how they compose.

On one spatial axis such a map reads, for every output position p,

    y[p] = sum_{t=0}^{taps-1} w[t] * x[stride * p + offset + dilation * t] + b,      0 <= p <= (n + excess) // stride

where x is zero outside 0..n-1. A convolution of kernel k, dilation d, padding (lo, hi) has offset = -lo and
excess = lo + hi - d*(k-1) - 1, so that the number of outputs, (n + excess) // stride + 1, is torch's formula. Writing sizes
this way, a strided slice, a crop and a pad are convolutions of one tap, and composition needs no special case:

    (first, then second)  stride = s1*s2   offset = o1 + s1*o2   excess = e1 + s1*(1 + e2)   taps at d1*t1 + s1*d2*t2

The last identity is floor(floor(a/s1)/s2) = floor(a/(s1*s2)): output sizes agree for every input size, odd ones included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fxmerge.errors import PlanError


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis of an affine map; the default is the identity.

    Args:
        taps: number of kernel taps, at least 1.
        stride: step between outputs, in input pixels, at least 1.
        offset: input position of the first tap for output 0; minus the leading padding.
        dilation: distance between taps, in input pixels; 1 where there is one tap.
        excess: lo + hi - extent; the number of outputs is (n + excess) // stride + 1.
    """

    taps: int = 1
    stride: int = 1
    offset: int = 0
    dilation: int = 1
    excess: int = -1

    @classmethod
    def convolution(cls, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> Axis:
        """The axis of a convolution with this kernel, stride, (leading, trailing) zero padding and dilation."""
        dilation = dilation if kernel > 1 else 1
        return cls(kernel, stride, -padding[0], dilation, sum(padding) - dilation * (kernel - 1) - 1)

    @property
    def extent(self) -> int:
        """Input pixels from the first tap to the last, both counted."""
        return self.dilation * (self.taps - 1) + 1

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros to add before and after the input; negative where pixels are cropped."""
        return -self.offset, self.excess + self.extent + self.offset

    @property
    def last(self) -> int:
        """Input position of the last tap for output 0."""
        return self.offset + self.extent - 1

    def outputs(self, size: int) -> int:
        """Number of outputs for an input of this many pixels."""
        return (size + self.excess) // self.stride + 1

    @lru_cache(maxsize=65536)  # noqa: B019 - frozen values; a network has few different axes and asks for them again and again
    def then(self, second: Axis) -> Axis:
        """This map followed by another.

        >>> Axis.convolution(3, 2, (1, 1), 1).then(Axis.convolution(3, 1, (1, 1), 1))
        Axis(taps=7, stride=2, offset=-3, dilation=1, excess=-1)
        """
        spread = self.stride * second.dilation
        steps = ([self.dilation] if self.taps > 1 else []) + ([spread] if second.taps > 1 else [])
        extent = self.extent + spread * (second.taps - 1)
        return self._spanning(
            first=self.offset + self.stride * second.offset,
            extent=extent,
            step=math.gcd(*steps),
            stride=self.stride * second.stride,
            excess=self.excess + self.stride * (1 + second.excess),
        )

    @lru_cache(maxsize=65536)  # noqa: B019 - as above
    def plus(self, other: Axis) -> Axis:
        """The pixelwise sum of two maps of one stride; their kernels are aligned at the output pixel."""
        steps = [a.dilation for a in (self, other) if a.taps > 1]
        first = min(self.offset, other.offset)
        return self._spanning(
            first=first,
            extent=max(self.last, other.last) - first + 1,
            step=math.gcd(*steps, abs(self.offset - other.offset)),
            stride=self.stride,
            excess=max(self.excess, other.excess),
        )

    def _spanning(self, *, first: int, extent: int, step: int, stride: int, excess: int) -> Axis:
        step = step or 1
        taps = (extent - 1) // step + 1
        return Axis(taps, stride, first, step if taps > 1 else 1, excess)

    def shrunk(self, taps: int) -> Axis:
        """The axis of a smaller kernel on the middle taps of this one (one tap nearer the end where they cannot be centred)."""
        skipped = (self.taps - taps + 1) // 2
        return Axis(taps, self.stride, self.offset + skipped * self.dilation, self.dilation if taps > 1 else 1, self.excess)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Everything about an affine map but its numbers: channels, groups, axes, and whether it has a bias.

    The weight of a map of this geometry has shape (C_out, C_in/groups, *kernel), as torch's convolutions have.
    """

    in_channels: int
    out_channels: int
    axes: tuple[Axis, ...]
    groups: int = 1
    bias: bool = False

    @classmethod
    def identity(cls, channels: int, dims: int) -> Geometry:
        """x -> x on this many channels and spatial dimensions: one tap, every channel a group of its own."""
        return cls(channels, channels, (Axis(),) * dims, channels)

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(axis.taps for axis in self.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(axis.stride for axis in self.axes)

    @property
    def dilation(self) -> tuple[int, ...]:
        return tuple(axis.dilation for axis in self.axes)

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        return tuple(axis.padding for axis in self.axes)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    @property
    def depthwise(self) -> bool:
        """Whether every input channel feeds its own outputs only (a channel multiplier is allowed)."""
        return self.groups == self.in_channels and self.in_channels > 1

    @property
    def preserves_shape(self) -> bool:
        """Whether output and input have one shape, whatever the size: what a convolution needs to be prunable."""
        return self.in_channels == self.out_channels and all(a.stride == 1 and a.excess == -1 for a in self.axes)

    @property
    def pointwise(self) -> bool:
        """Whether output pixel p reads input pixel p alone, and there is nothing to pad or crop."""
        return all(a == Axis() for a in self.axes)

    def outputs(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial output size for a spatial input size."""
        return tuple(axis.outputs(n) for axis, n in zip(self.axes, size, strict=True))

    def multiply_adds(self, size: Sequence[int]) -> int:
        """Multiply-adds for one image of this spatial input size."""
        return math.prod(self.weight_shape) * math.prod(self.outputs(size))

    def then(self, second: Geometry) -> Geometry:
        """This map followed by another; groups stay groups where both partitions allow it.

        Raises:
            ValueError: the channels do not meet.
        """
        if self.out_channels != second.in_channels:
            raise ValueError(f"{self.out_channels} channels meet {second.in_channels}")
        return Geometry(
            self.in_channels,
            second.out_channels,
            tuple(a.then(b) for a, b in zip(self.axes, second.axes, strict=True)),
            math.gcd(self.groups, second.groups),
            self.bias or second.bias,
        )

    def plus(self, other: Geometry) -> Geometry:
        """The sum of two maps of one stride between the same channels.

        Raises:
            ValueError: channels or strides differ.
        """
        self._check_alike(other, channels=True)
        return Geometry(
            self.in_channels,
            self.out_channels,
            tuple(a.plus(b) for a, b in zip(self.axes, other.axes, strict=True)),
            math.gcd(self.groups, other.groups),
            self.bias or other.bias,
        )

    def concat(self, other: Geometry) -> Geometry:
        """The outputs of two maps of one stride, of the same input, one after the other on channels.

        Raises:
            ValueError: input channels or strides differ.
        """
        self._check_alike(other, channels=False)
        return Geometry(
            self.in_channels,
            self.out_channels + other.out_channels,
            tuple(a.plus(b) for a, b in zip(self.axes, other.axes, strict=True)),
            1,
            self.bias or other.bias,
        )

    def _check_alike(self, other: Geometry, *, channels: bool) -> None:
        if self.stride != other.stride:
            raise ValueError(f"paths with different strides meet: {self.stride} and {other.stride}")
        if self.in_channels != other.in_channels or (channels and self.out_channels != other.out_channels):
            mine, theirs = (f"{g.in_channels} -> {g.out_channels}" for g in (self, other))
            raise ValueError(f"paths with different channels meet: {mine} and {theirs}")

    def __str__(self) -> str:
        parts = [f"{self.in_channels}->{self.out_channels}", "x".join(map(str, self.kernel))]
        if any(s != 1 for s in self.stride):
            parts.append("s" + "x".join(map(str, self.stride)))
        if any(d != 1 for d in self.dilation):
            parts.append("d" + "x".join(map(str, self.dilation)))
        if self.groups != 1:
            parts.append("dw" if self.depthwise and self.in_channels == self.out_channels else f"g{self.groups}")
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """A value that ``json`` can write and :meth:`from_json` reads back."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "axes": [[a.taps, a.stride, a.offset, a.dilation, a.excess] for a in self.axes],
            "groups": self.groups,
            "bias": self.bias,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Geometry:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: it is not such a value.
        """
        try:
            axes = tuple(Axis(*(whole(v) for v in axis)) for axis in data["axes"])
            geometry = cls(whole(data["in_channels"]), whole(data["out_channels"]), axes, whole(data["groups"]), bool(data["bias"]))
        except (KeyError, TypeError, ValueError) as fault:
            raise PlanError(f"not a geometry: {fault!r} in {data!r}") from fault
        sane = (
            all(a.taps > 0 and a.stride > 0 and a.dilation > 0 for a in axes)
            and min(geometry.in_channels, geometry.out_channels, geometry.groups) > 0
        )
        if not sane or geometry.in_channels % geometry.groups or geometry.out_channels % geometry.groups:
            raise PlanError(f"not a geometry: sizes do not fit in {data!r}")
        return geometry


def whole(value: object) -> int:
    """An int as it is; anything else (a bool, a float, a string) is a ValueError, never a silent conversion."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a whole number, found {value!r}")
    return value
