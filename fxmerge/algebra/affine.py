r"""Affine maps with their numbers, and how they compose; tensors only.

    y[p] = sum_t K[t] x[s*p + o + d*t] + b,      x with u - 1 zeros behind every pixel

chain   K[s1*d2*t2 + u2*d1*t1] += K2[t2] @ K1[t1] for all taps (a transposed convolution of K2 by K1);
        b = b2 + K2.sum(taps) / u2 @ b1, where b1 stays constant: each of the u2 pixels sums K2 over every u2-th position
sum     kernels aligned at the output pixel and added;  biases added
concat  kernels aligned and stacked on output channels
Sizes, offsets and strides are :mod:`fxmerge.core.geometry`'s. Groups stay groups: operands are brought to the greatest common
divisor of their group counts, which is as fine a partition as both respect. Everything is float64; the caller casts once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxmerge.core.expression import Expression, Step
from fxmerge.core.geometry import Axis, Geometry


@dataclass(frozen=True, eq=False)
class Affine:
    """A geometry with its numbers.

    Args:
        geometry: sizes.
        weight: float64, (C_out, C_in/groups, *kernel).
        bias: float64, (C_out,); zeros where the geometry has none.
    """

    geometry: Geometry
    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if tuple(self.weight.shape) != self.geometry.weight_shape:
            raise ValueError(f"{self.geometry} needs a weight of {self.geometry.weight_shape}, found {tuple(self.weight.shape)}")

    @classmethod
    def of(cls, geometry: Geometry, weight: Tensor, bias: Tensor | None = None) -> Affine:
        """A map from tensors of any float dtype, taken to float64; they are not part of any autograd graph."""
        weight = weight.detach().double()
        bias = weight.new_zeros(geometry.out_channels) if bias is None else bias.detach().double()
        return cls(geometry, weight, bias)

    @classmethod
    def identity(cls, channels: int, dims: int) -> Affine:
        return cls.of(Geometry.identity(channels, dims), torch.ones(channels, *(1,) * (dims + 1), dtype=torch.float64))

    def then(self, second: Affine) -> Affine:
        """This map followed by another.

        Raises:
            ValueError: the geometries do not compose, or the bias becomes a pattern (:class:`Geometry`).
        """
        geometry = self.geometry.then(second.geometry)
        if geometry.phased:
            raise ValueError(f"the bias of {self.geometry} becomes a pattern in {second.geometry}")
        nested = geometry.groups in (self.geometry.groups, second.geometry.groups)
        one = self if nested else self.regrouped(geometry.groups)
        weight = self.weight.new_zeros(geometry.weight_shape)
        for tap in itertools.product(*(range(axis.taps) for axis in second.geometry.axes)):
            # A tap of the second map is a matrix on channels; it puts a copy of the first kernel, mixed by it, at its place.
            places = map(_copy_places, self.geometry.axes, second.geometry.axes, geometry.axes, tap)
            at_tap = tuple(slice(t, t + 1) for t in tap)
            weight[_on_taps(places)] += _mixed(one, second, second.weight[_on_taps(at_tap)].flatten(1))
        return Affine(geometry, weight, second.bias + second._on_constant(self.bias))

    def _on_constant(self, value: Tensor) -> Tensor:
        """What this map, even, without its bias, makes of an image constant over space; (C_in, ...) -> (C_out, ...)."""
        sums = (self.weight.flatten(2).sum(2) / math.prod(self.geometry.up)).unflatten(0, (self.geometry.groups, -1))
        return torch.einsum("goi,gi...->go...", sums, value.unflatten(0, (self.geometry.groups, -1))).flatten(0, 1)

    def plus(self, other: Affine) -> Affine:
        """The sum of two maps."""
        geometry = self.geometry.plus(other.geometry)
        weight = self._spread(geometry, geometry.groups) + other._spread(geometry, geometry.groups)
        return Affine(geometry, weight, self.bias + other.bias)

    def minus(self, other: Affine) -> Affine:
        """The difference of two maps."""
        return self.plus(replace(other, weight=-other.weight, bias=-other.bias))

    def concat(self, other: Affine) -> Affine:
        """The outputs of two maps of the same input, one after the other on channels."""
        geometry = self.geometry.concat(other.geometry)
        parts = [part._spread(geometry, 1) for part in (self, other)]
        return Affine(geometry, torch.cat(parts), torch.cat((self.bias, other.bias)))

    def _spread(self, onto: Geometry, groups: int) -> Tensor:
        """The weight at ``groups`` groups, on the taps of a geometry that covers this one's."""
        weight = self.regrouped(groups).weight
        spread = weight.new_zeros(*weight.shape[:2], *onto.kernel)
        spread[_on_taps(map(_places, self.geometry.axes, onto.axes))] = weight
        return spread

    def regrouped(self, groups: int) -> Affine:
        """The same map written with fewer groups; ``groups`` divides this one's."""
        mine = self.geometry.groups
        if groups == mine:
            return self
        ratio = mine // groups
        # (groups, ratio, C_out/mine, C_in/mine, taps): block `ratio` of the outputs reads block `ratio` of the inputs.
        blocks = self.weight.unflatten(0, (groups, ratio, -1))
        wide = blocks.new_zeros(groups, ratio, blocks.shape[2], ratio, *blocks.shape[3:])
        index = torch.arange(ratio, device=blocks.device)
        wide[:, index, :, index] = blocks.transpose(0, 1)
        geometry = replace(self.geometry, groups=groups)
        return Affine(geometry, wide.reshape(geometry.weight_shape), self.bias)


def _on_taps(places: Iterable[slice]) -> tuple[slice, ...]:
    """An index into a weight: all channels, these taps."""
    return slice(None), slice(None), *places


def _mixed(first: Affine, second: Affine, matrix: Tensor) -> Tensor:
    """Channels of the first kernel mixed by one tap of the second, (C2, C1/g2); (C2, C0/g, *first kernel), g the smaller."""
    g1, g2 = first.geometry.groups, second.geometry.groups
    kernel = first.weight.flatten(1)
    if g2 % g1 == 0:  # every group of the second reads inside one group of the first
        mixed = torch.bmm(matrix.unflatten(0, (g2, -1)), kernel.unflatten(0, (g2, -1)))
        return mixed.reshape(-1, *first.weight.shape[1:])
    blocks = matrix.unflatten(0, (g2, -1)).unflatten(2, (g1 // g2, -1)).transpose(1, 2).flatten(0, 1)
    mixed = torch.bmm(blocks, kernel.unflatten(0, (g1, -1)))  # (g1, C2/g2, C0/g1 * taps)
    mixed = mixed.reshape(g2, g1 // g2, -1, *first.weight.shape[1:]).transpose(1, 2)
    return mixed.reshape(second.geometry.out_channels, -1, *first.weight.shape[2:])


def _copy_places(first: Axis, second: Axis, composed: Axis, tap: int) -> slice:
    """The taps of the composed axis that the first kernel lands on when the second's ``tap`` reads it."""
    start = first.stride * second.dilation * tap // composed.dilation
    step = second.up * first.dilation // composed.dilation if first.taps > 1 else 1
    return slice(start, start + step * (first.taps - 1) + 1, step)


def _places(inner: Axis, outer: Axis) -> slice:
    """Which of the outer axis's taps are the inner's."""
    first = (inner.offset - outer.offset) // outer.dilation
    step = inner.dilation // outer.dilation if inner.taps > 1 else 1
    return slice(first, first + step * (inner.taps - 1) + 1, step)


def evaluate(expression: Expression, maps: Mapping[str, Affine]) -> Affine:
    """The one map that an expression computes.

    Args:
        expression: of a segment.
        maps: for every applied step, by its name, the map with its numbers.
    """

    def entry(step: Step) -> Affine:
        assert step.geometry is not None
        device = next(iter(maps.values())).weight.device if maps else None
        start = Affine.identity(step.geometry.in_channels, len(step.geometry.axes))
        return replace(start, weight=start.weight.to(device), bias=start.bias.to(device))

    values: tuple[Affine, ...] = expression.fold(
        entry=entry,
        apply=lambda step, before: before.then(maps[step.name]),
        add=Affine.plus,
        concat=Affine.concat,
        subtract=Affine.minus,
    )
    return values[-1]


@dataclass(frozen=True, eq=False)
class _Sides:
    """What is made of each side input so far: by name, a matrix (channels, channels of the side input)."""

    channels: int
    matrices: Mapping[str, Tensor]

    def combined(self, other: _Sides, how: Callable[[Tensor, Tensor], Tensor], channels: int) -> _Sides:
        names = dict.fromkeys((*self.matrices, *other.matrices))
        return _Sides(channels, {name: how(self._of(name, other), other._of(name, self)) for name in names})

    def _of(self, name: str, other: _Sides) -> Tensor:
        if name in self.matrices:
            return self.matrices[name]
        like = other.matrices[name]
        return like.new_zeros(self.channels, like.shape[1])


def evaluate_sides(expression: Expression, maps: Mapping[str, Affine]) -> dict[str, Tensor]:
    """What an expression makes of the side inputs that are added inside: each passes as a matrix, its image being constant.

    Args:
        expression: of a segment.
        maps: for every applied step, by its name, the map with its numbers.

    Returns:
        By the name of the node that gives the side input, a matrix (C_out, C_side), float64.
    """

    def apply(step: Step, before: _Sides) -> _Sides:
        affine = maps[step.name]
        if step.role != "side":
            done = {name: affine._on_constant(matrix) for name, matrix in before.matrices.items()}
            return _Sides(affine.geometry.out_channels, done)
        added = _Sides(before.channels, {step.side: torch.eye(before.channels, dtype=torch.float64, device=affine.weight.device)})
        return before.combined(added, torch.add, before.channels)

    values: tuple[_Sides, ...] = expression.fold(
        entry=lambda step: _Sides(step.geometry.in_channels if step.geometry else 0, {}),
        apply=apply,
        add=lambda a, b: a.combined(b, torch.add, a.channels),
        concat=lambda a, b: a.combined(b, lambda x, y: torch.cat((x, y)), a.channels + b.channels),
        subtract=lambda a, b: a.combined(b, torch.sub, a.channels),
    )
    return dict(values[-1].matrices)


def vanishing(expression: Expression, maps: Mapping[str, Affine]) -> tuple[bool, ...]:
    """For every step, whether its tensor is zero outside the image if the entry is, by the numbers.

    It is where it was computed by maps that read nothing inside for what is outside, and their biases cancel there. (A norm, and
    then its value for zero subtracted.)
    """

    def apply(step: Step, before: Affine | None) -> Affine | None:
        known = before is not None and step.role != "side" and all(a.keeps_zeros for a in maps[step.name].geometry.axes)
        return before.then(maps[step.name]) if known and before is not None else None

    def joined(how: Callable[[Affine, Affine], Affine]) -> Callable[[Affine | None, Affine | None], Affine | None]:
        return lambda a, b: None if a is None or b is None else how(a, b)

    values: tuple[Affine | None, ...] = expression.fold(
        entry=lambda step: Affine.identity(step.geometry.in_channels, len(step.geometry.axes)) if step.geometry else None,
        apply=apply,
        add=joined(Affine.plus),
        concat=joined(Affine.concat),
        subtract=joined(Affine.minus),
    )
    return tuple(value is not None and _is_zero(value) for value in values)


def _is_zero(value: Affine) -> bool:
    return bool((value.bias.abs() <= 1e-12 * (1 + value.weight.abs().amax())).all())


def pointwise(matrix: Tensor, dims: int) -> Affine:
    """The same matrix (C_out, C_in) on every pixel."""
    geometry = Geometry(matrix.shape[1], matrix.shape[0], (Axis(),) * dims)
    return Affine.of(geometry, matrix.reshape(geometry.weight_shape))


def scaling(scale: Tensor, shift: Tensor, dims: int) -> Affine:
    """x -> scale * x + shift, per channel; scale and shift have shape (C,)."""
    channels = scale.numel()
    geometry = replace(Geometry.identity(channels, dims), bias=True)
    return Affine.of(geometry, scale.reshape(channels, *(1,) * (dims + 1)), shift)
