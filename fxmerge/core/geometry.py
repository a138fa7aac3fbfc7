r"""Sizes of translation-equivariant affine maps, axis by axis, and how they compose.

On one spatial axis such a map reads, for every output position p,

    y[p] = sum_{t=0}^{taps-1} w[t] * x[stride * p + offset + dilation * t] + b,      0 <= p <= (up * n + excess) // stride

where x is zero outside 0..n-1 and, where up > 1, stands for x with up - 1 zeros behind every pixel: x[q] is pixel q/up where up
divides q, else 0. A convolution of kernel k, dilation d, padding (lo, hi) has offset = -lo and excess = lo + hi - d*(k-1) - 1, so
that the number of outputs, (n + excess) // stride + 1, is torch's formula. Writing sizes this way, a strided slice, a crop and a
pad are convolutions of one tap, and composition needs no special case:

    (first, then second)  up = u1*u2   stride = s1*s2   offset = u2*o1 + s1*o2   excess = u2*(e1 + s1) + s1*e2
                          taps at u2*d1*t1 + s1*d2*t2

For u2 = 1 the excess is floor(floor(a/s1)/s2) = floor(a/(s1*s2)): output sizes agree for every input size, odd ones included. For
s1 = 1 there is nothing to round, and a filter before an upsampling is the filter with its taps spread behind it: x[q/u] filtered is
read only where u divides q, and there both are the same (the noble identity; P. P. Vaidyanathan, "Multirate Systems and Filter
Banks", 1993, section 4.2). Where a stride comes before an upsampling, or the other way round, the result has no such form, and
composing is a ValueError. A transposed convolution of stride u is one with its kernel turned round; nearest upsampling by u has u
taps of one at offset -(u - 1).
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
        dilation: distance between taps, in input positions; 1 where there is one tap.
        excess: lo + hi - extent; the number of outputs is (up * n + excess) // stride + 1.
        up: how many positions a pixel takes, itself and the zeros behind it; offset, dilation and excess count positions.
    """

    taps: int = 1
    stride: int = 1
    offset: int = 0
    dilation: int = 1
    excess: int = -1
    up: int = 1

    @classmethod
    def convolution(cls, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> Axis:
        """The axis of a convolution with this kernel, stride, (leading, trailing) zero padding and dilation."""
        dilation = dilation if kernel > 1 else 1
        return cls(kernel, stride, -padding[0], dilation, sum(padding) - dilation * (kernel - 1) - 1)

    @classmethod
    def transposed(cls, kernel: int, stride: int, padding: int, output_padding: int, dilation: int) -> Axis:
        """The axis of torch's transposed convolution: n pixels become stride*(n - 1) + extent - 2*padding + output_padding."""
        dilation = dilation if kernel > 1 else 1
        reach = dilation * (kernel - 1)
        return cls(kernel, 1, padding - reach, dilation, reach - stride - 2 * padding + output_padding, stride)

    @classmethod
    def nearest(cls, factor: int) -> Axis:
        """Every pixel repeated so many times."""
        return cls.transposed(factor, factor, 0, 0, 1)

    @property
    def extent(self) -> int:
        """Input positions from the first tap to the last, both counted."""
        return self.dilation * (self.taps - 1) + 1

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros to add before and after the input, in pixels; negative where pixels are cropped."""
        return self.halo(0, 0)

    @property
    def unpadded(self) -> Axis:
        """The same kernel where all padding is done before: the first output is the first that the pixels given suffice for.

        For up = 1 it reads pixel 0 first. For up > 1, what lies between two pixels is known to be zero, so it begins up - 1
        positions before pixel 0, or, if the kernel is shorter than that, with its last tap on pixel 0.
        """
        short, long = sorted((self.extent, self.up))
        return Axis(self.taps, self.stride, 1 - short, self.dilation, short - long - 1, self.up)

    def halo(self, before: int, after: int) -> tuple[int, int]:
        """Pixels more, (before, after), that the input must have for so many outputs more; negative where some are not read.

        With B more outputs wanted before 0 the first position read is offset - stride*B. Padded by u pixels, the unpadded map's
        first is at unpadded.offset - up*u, which must not be later; likewise at the end.
        """
        bare = self.unpadded
        first = self.stride * before - self.offset + bare.offset
        last = self.stride * after + self.excess + self.offset - bare.excess - bare.offset
        return -(-first // self.up), -(-last // self.up)

    def surplus(self, before: int, after: int) -> tuple[int, int]:
        """Outputs more than wanted, (before, after), that the unpadded map gives for the halo asked for; 0 to up - 1."""
        bare, (u, v) = self.unpadded, self.halo(before, after)
        return (
            self.up * u + self.offset - bare.offset - self.stride * before,
            self.up * v + bare.excess + bare.offset - self.excess - self.offset - self.stride * after,
        )

    @property
    def keeps_zeros(self) -> bool:
        """Whether outputs outside the image read nothing inside it: what is zero outside stays so, where there is no bias."""
        return self.last < self.stride and self.excess + self.offset + self.up >= 0

    @property
    def last(self) -> int:
        """Input position of the last tap for output 0."""
        return self.offset + self.extent - 1

    def outputs(self, size: int) -> int:
        """Number of outputs for an input of this many pixels."""
        return (self.up * size + self.excess) // self.stride + 1

    @lru_cache(maxsize=65536)  # noqa: B019 - frozen values; a network has few different axes and asks for them again and again
    def then(self, second: Axis) -> Axis:
        """This map followed by another.

        >>> Axis.convolution(3, 2, (1, 1), 1).then(Axis.convolution(3, 1, (1, 1), 1))
        Axis(taps=7, stride=2, offset=-3, dilation=1, excess=-1, up=1)
        >>> Axis.nearest(2).then(Axis.convolution(3, 1, (1, 1), 1)) == Axis.transposed(4, 2, 1, 0, 1)
        True

        Raises:
            ValueError: one makes the image smaller, the other larger.
        """
        if self.stride > 1 and second.up > 1:
            raise ValueError(f"an image that became smaller by {self.stride} is made larger by {second.up}")
        if self.up * second.up > 1 and second.stride > 1:
            raise ValueError(f"an image that became larger by {self.up * second.up} is made smaller by {second.stride}")
        wide, spread = second.up * self.dilation, self.stride * second.dilation
        steps = ([wide] if self.taps > 1 else []) + ([spread] if second.taps > 1 else [])
        return self._spanning(
            first=second.up * self.offset + self.stride * second.offset,
            extent=wide * (self.taps - 1) + spread * (second.taps - 1) + 1,
            step=math.gcd(*steps),
            stride=self.stride * second.stride,
            excess=second.up * (self.excess + self.stride) + self.stride * second.excess,
            up=self.up * second.up,
        )

    @lru_cache(maxsize=65536)  # noqa: B019 - as above
    def plus(self, other: Axis) -> Axis:
        """The pixelwise sum of two maps of one stride and one ``up``; their kernels are aligned at the output pixel."""
        steps = [a.dilation for a in (self, other) if a.taps > 1]
        first = min(self.offset, other.offset)
        return self._spanning(
            first=first,
            extent=max(self.last, other.last) - first + 1,
            step=math.gcd(*steps, abs(self.offset - other.offset)),
            stride=self.stride,
            excess=max(self.excess, other.excess),
            up=self.up,
        )

    def _spanning(self, *, first: int, extent: int, step: int, stride: int, excess: int, up: int) -> Axis:
        step = step or 1
        taps = (extent - 1) // step + 1
        return Axis(taps, stride, first, step if taps > 1 else 1, excess, up)

    def shrunk(self, taps: int) -> Axis:
        """The axis of a smaller kernel on the middle taps of this one (one tap nearer the end where they cannot be centred)."""
        skipped = (self.taps - taps + 1) // 2
        dilation = self.dilation if taps > 1 else 1
        return Axis(taps, self.stride, self.offset + skipped * self.dilation, dilation, self.excess, self.up)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Everything about an affine map but its numbers: channels, groups, axes, and whether it has a bias.

    The weight of a map of this geometry has shape (C_out, C_in/groups, *kernel), as torch's convolutions have.

    Args:
        even: whether an image that is constant over space stays constant, whatever the numbers; where pixels become several, only
            if all of these are the same sum of weights, as in nearest upsampling. A transposed convolution of stride 2 makes a
            pattern of it.
        phased: whether a bias has been made such a pattern: then no convolution of torch's computes the map.
    """

    in_channels: int
    out_channels: int
    axes: tuple[Axis, ...]
    groups: int = 1
    bias: bool = False
    even: bool = True
    phased: bool = False

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
    def up(self) -> tuple[int, ...]:
        return tuple(axis.up for axis in self.axes)

    @property
    def enlarges(self) -> bool:
        """Whether pixels become several, on some axis."""
        return any(axis.up > 1 for axis in self.axes)

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
        return self.in_channels == self.out_channels and all(a.stride == a.up == 1 and a.excess == -1 for a in self.axes)

    @property
    def pointwise(self) -> bool:
        """Whether output pixel p reads input pixel p alone, and there is nothing to pad or crop."""
        return all(a == Axis() for a in self.axes)

    @property
    def keeps_zeros(self) -> bool:
        """Whether outputs outside the image are zero if the input is: they read nothing inside, and there is no bias."""
        return not self.bias and all(axis.keeps_zeros for axis in self.axes)

    def outputs(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial output size for a spatial input size."""
        return tuple(axis.outputs(n) for axis, n in zip(self.axes, size, strict=True))

    def multiply_adds(self, size: Sequence[int]) -> int:
        """Multiply-adds for one image of this spatial input size; taps that fall between two pixels take none."""
        taps = (-(-axis.taps * n // axis.up) for axis, n in zip(self.axes, self.outputs(size), strict=True))
        return math.prod(self.weight_shape[:2]) * math.prod(taps)

    def then(self, second: Geometry) -> Geometry:
        """This map followed by another; groups stay groups where both partitions allow it.

        Raises:
            ValueError: the channels do not meet, or one makes the image smaller, the other larger.
        """
        if self.out_channels != second.in_channels:
            raise ValueError(f"{self.out_channels} channels meet {second.in_channels}")
        axes = tuple(a.then(b) for a, b in zip(self.axes, second.axes, strict=True))
        if any(a.up > 1 for a in axes) and any(a.stride > 1 for a in axes):
            raise ValueError("an image that becomes larger on one axis becomes smaller on another")
        return Geometry(
            self.in_channels,
            second.out_channels,
            axes,
            math.gcd(self.groups, second.groups),
            self.bias or second.bias,
            self.even and second.even,
            self.phased or second.phased or (self.bias and not second.even),
        )

    def plus(self, other: Geometry) -> Geometry:
        """The sum of two maps of one stride between the same channels.

        Raises:
            ValueError: channels, strides or factors of upsampling differ.
        """
        self._check_alike(other, channels=True)
        return Geometry(
            self.in_channels,
            self.out_channels,
            tuple(a.plus(b) for a, b in zip(self.axes, other.axes, strict=True)),
            math.gcd(self.groups, other.groups),
            self.bias or other.bias,
            self.even and other.even,
            self.phased or other.phased,
        )

    def concat(self, other: Geometry) -> Geometry:
        """The outputs of two maps of one stride, of the same input, one after the other on channels.

        Raises:
            ValueError: input channels, strides or factors of upsampling differ.
        """
        self._check_alike(other, channels=False)
        return Geometry(
            self.in_channels,
            self.out_channels + other.out_channels,
            tuple(a.plus(b) for a, b in zip(self.axes, other.axes, strict=True)),
            1,
            self.bias or other.bias,
            self.even and other.even,
            self.phased or other.phased,
        )

    def _check_alike(self, other: Geometry, *, channels: bool) -> None:
        if self.stride != other.stride:
            raise ValueError(f"paths with different strides meet: {self.stride} and {other.stride}")
        if self.up != other.up:
            raise ValueError(f"paths meet on which the image became larger by different factors: {self.up} and {other.up}")
        if self.in_channels != other.in_channels or (channels and self.out_channels != other.out_channels):
            mine, theirs = (f"{g.in_channels} -> {g.out_channels}" for g in (self, other))
            raise ValueError(f"paths with different channels meet: {mine} and {theirs}")

    def __str__(self) -> str:
        parts = [f"{self.in_channels}->{self.out_channels}", "x".join(map(str, self.kernel))]
        if any(s != 1 for s in self.stride):
            parts.append("s" + "x".join(map(str, self.stride)))
        if self.enlarges:
            parts.append("u" + "x".join(map(str, self.up)))
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
            "axes": [[a.taps, a.stride, a.offset, a.dilation, a.excess, *([a.up] if a.up > 1 else [])] for a in self.axes],
            "groups": self.groups,
            "bias": self.bias,
            **({} if self.even else {"even": False}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Geometry:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: it is not such a value.
        """
        try:
            axes = tuple(Axis(*(whole(v) for v in axis)) for axis in data["axes"])
            channels, groups = (whole(data["in_channels"]), whole(data["out_channels"])), whole(data["groups"])
            geometry = cls(*channels, axes, groups, bool(data["bias"]), bool(data.get("even", True)))
        except (KeyError, TypeError, ValueError) as fault:
            raise PlanError(f"not a geometry: {fault!r} in {data!r:.200}") from fault
        sane = (
            all(min(a.taps, a.stride, a.dilation, a.up) > 0 for a in axes)
            and (all(a.up == 1 for a in axes) or all(a.stride == 1 for a in axes))
            and min(geometry.in_channels, geometry.out_channels, geometry.groups) > 0
        )
        if not sane or geometry.in_channels % geometry.groups or geometry.out_channels % geometry.groups:
            raise PlanError(f"not a geometry: sizes do not fit in {data!r:.200}")
        return geometry


def in_pad_order(pads: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """(before, after) of every axis in the order of ``F.pad``: the last axis first.

    >>> in_pad_order(((1, 2), (3, 4)))
    (3, 4, 1, 2)
    """
    return tuple(amount for pair in reversed(pads) for amount in pair)


def whole(value: object) -> int:
    """An int of 64 bits as it is; anything else (a bool, a float, a string) is a ValueError, never a silent conversion."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a whole number, found {value!r:.80}")
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"expected a whole number of at most 64 bits, found one of {value.bit_length()}")
    return value
