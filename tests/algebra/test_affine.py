"""Composed maps against the convolutions they are made of, run one after the other by torch on an image without borders."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmerge.algebra.affine import Affine, evaluate, scaling
from fxmerge.core.expression import Expression, Step
from fxmerge.core.geometry import Axis, Geometry

#: An image without borders: a window of positions, (first, one behind the last) on every axis -> (1, C, *sizes).
Image: TypeAlias = Callable[[tuple[tuple[int, int], ...]], Tensor]
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def noise(channels: int, dims: int) -> Image:
    """Numbers without a pattern, from -1 to 1, at every position: the fraction of a large multiple of a sine."""

    def image(window: tuple[tuple[int, int], ...]) -> Tensor:
        ranges = [torch.arange(channels), *(torch.arange(first, last) for first, last in window)]
        grids = torch.meshgrid(*ranges, indexing="ij")
        mixed = sum(grid * factor for grid, factor in zip(grids, (78.233, 12.9898, 37.719, 94.673), strict=False))
        return torch.frac(torch.sin(torch.as_tensor(mixed, dtype=torch.float64)) * 43758.5453)[None]

    return image


def run(affine: Affine, image: Image) -> Image:
    """What a map makes of an image, by torch's convolution, transposed where it makes it larger."""
    g = affine.geometry
    if g.enlarges:
        return _run_transposed(affine, image)

    def result(window: tuple[tuple[int, int], ...]) -> Tensor:
        read = tuple(
            (axis.stride * first + axis.offset, axis.stride * (last - 1) + axis.offset + axis.extent)
            for axis, (first, last) in zip(g.axes, window, strict=True)
        )
        convolve: Any = CONVOLVE[len(g.axes)]
        made: Tensor = convolve(image(read), affine.weight, affine.bias, g.stride, 0, g.dilation, g.groups)
        return made

    return result


def _run_transposed(affine: Affine, image: Image) -> Image:
    """Of pixels first.. torch gives outputs from first*up on, each with its extent - 1 before it; more than enough are computed."""
    g = affine.geometry
    blocks = affine.weight.unflatten(0, (g.groups, -1)).transpose(1, 2).flatten(0, 1)
    weight = blocks.flip(tuple(range(2, blocks.dim())))
    transpose: Any = TRANSPOSE[len(g.axes)]

    def result(window: tuple[tuple[int, int], ...]) -> Tensor:
        spans = list(zip(g.axes, window, strict=True))
        read = tuple(((first + a.offset) // a.up - 1, (last + a.offset + a.extent) // a.up + 2) for a, (first, last) in spans)
        whole = transpose(image(read), weight, affine.bias, g.up, 0, 0, g.groups, g.dilation)
        starts = [first + a.offset + a.extent - 1 - a.up * low for (a, (first, _)), (low, _) in zip(spans, read, strict=True)]
        cut = [slice(start, start + last - first) for start, (first, last) in zip(starts, window, strict=True)]
        made: Tensor = whole[(slice(None), slice(None), *cut)]
        return made

    return result


def assert_same(found: Image, expected: Image, dims: int) -> None:
    window = ((-3, 4), (-2, 3), (-1, 2))[:dims]
    torch.testing.assert_close(found(window), expected(window), rtol=1e-11, atol=1e-11)


def random_affine(geometry: Geometry, seed: int = 0) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(geometry.weight_shape, dtype=torch.float64, generator=generator)
    bias = torch.randn(geometry.out_channels, dtype=torch.float64, generator=generator)
    return Affine.of(geometry, weight, bias if geometry.bias else None)


CHANNELS = st.sampled_from((1, 2, 4, 6, 12))


@st.composite
def geometries(
    draw: st.DrawFn, dims: int, inputs: int, outputs: int | None = None, stride: tuple[int, ...] | None = None
) -> Geometry:
    outputs = outputs or draw(CHANNELS)
    axes = []
    for number in range(dims):
        taps, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        step = stride[number] if stride else draw(st.integers(1, 3))
        axes.append(Axis.convolution(taps, step, (draw(st.integers(-2, 4)), draw(st.integers(-2, 4))), dilation))
    shared = math.gcd(inputs, outputs)
    groups = draw(st.sampled_from([g for g in range(1, shared + 1) if shared % g == 0]))
    return Geometry(inputs, outputs, tuple(axes), groups, draw(st.booleans()))


def nearest(channels: int, *factors: int) -> Affine:
    geometry = Geometry(channels, channels, tuple(map(Axis.nearest, factors)), channels)
    return Affine.of(geometry, torch.ones(geometry.weight_shape))


@st.composite
def enlarging(draw: st.DrawFn, dims: int, inputs: int, seed: int, up: tuple[int, ...] | None = None, **shape: int) -> Affine:
    """A transposed convolution, of these factors if given, or nearest upsampling."""
    up = up or tuple(draw(st.integers(1, 3)) for _ in range(dims))
    if not shape and draw(st.booleans()):
        return nearest(inputs, *up)
    plain = draw(geometries(dims, inputs, shape.get("outputs"), (1,) * dims))
    axes = tuple(
        Axis.transposed(a.taps, u, draw(st.integers(-1, 4)), draw(st.integers(-3, 2)), a.dilation)
        for a, u in zip(plain.axes, up, strict=True)
    )
    return random_affine(replace(plain, axes=axes, even=False), seed)


@st.composite
def chains(draw: st.DrawFn, length: int, *, larger: bool = False) -> list[Affine]:
    dims, channels = draw(st.integers(1, 2 if length > 2 else 3)), draw(CHANNELS)
    maps: list[Affine] = []
    for number in range(length):
        if larger and draw(st.booleans()):
            maps.append(draw(enlarging(dims, channels, number)))
        else:
            geometry = draw(geometries(dims, channels, None, (1,) * dims if larger else None))
            maps.append(random_affine(geometry, number))
        channels = maps[-1].geometry.out_channels
    return maps


@st.composite
def pairs(draw: st.DrawFn, *, same_outputs: bool) -> tuple[Affine, Affine]:
    """Two maps of one input and one stride."""
    dims, inputs = draw(st.integers(1, 2)), draw(CHANNELS)
    if draw(st.booleans()):
        first = draw(enlarging(dims, inputs, 1))
        shape = {"outputs": first.geometry.out_channels if same_outputs else draw(CHANNELS)}
        return first, draw(enlarging(dims, inputs, 2, first.geometry.up, **shape))
    one = draw(geometries(dims, inputs))
    other = draw(geometries(dims, inputs, one.out_channels if same_outputs else None, one.stride))
    return random_affine(one, 1), random_affine(other, 2)


def image_for(affine: Affine) -> tuple[Image, int]:
    dims = len(affine.geometry.axes)
    return noise(affine.geometry.in_channels, dims), dims


class TestThen:
    @given(chains(2))
    def test_a_chain_is_its_convolutions_in_sequence(self, maps: list[Affine]) -> None:
        image, dims = image_for(maps[0])
        assert_same(run(maps[0].then(maps[1]), image), run(maps[1], run(maps[0], image)), dims)

    @given(chains(2, larger=True))
    def test_a_chain_that_makes_the_image_larger_is_its_maps_in_sequence(self, maps: list[Affine]) -> None:
        one, two = maps
        if one.geometry.bias and not two.geometry.even:
            with pytest.raises(ValueError, match="becomes a pattern"):
                one.then(two)
            one = replace(one, geometry=replace(one.geometry, bias=False), bias=torch.zeros_like(one.bias))
        image, dims = image_for(one)
        assert_same(run(one.then(two), image), run(two, run(one, image)), dims)

    def test_a_bias_passes_through_nearest_upsampling_and_what_is_behind_it(self) -> None:
        one = random_affine(Geometry(2, 3, (Axis.convolution(3, 1, (1, 1), 1),) * 2, bias=True), 1)
        three = random_affine(Geometry(3, 2, (Axis.convolution(3, 1, (1, 1), 1),) * 2, bias=True), 2)
        two, image = nearest(3, 2, 3), noise(2, 2)
        expected = run(three, run(two, run(one, image)))
        assert_same(run(one.then(two.then(three)), image), expected, 2)
        assert_same(run(one.then(two).then(three), image), expected, 2)

    def test_nearest_upsampling_is_torchs(self) -> None:
        image = noise(2, 2)
        found = run(nearest(2, 3, 2), image)(((0, 12), (0, 8)))
        assert torch.equal(found, F.interpolate(image(((0, 4), (0, 4))), scale_factor=(3, 2)))

    @given(chains(3, larger=True))
    def test_chains_that_make_the_image_larger_associate(self, maps: list[Affine]) -> None:
        maps = [replace(a, geometry=replace(a.geometry, bias=False), bias=torch.zeros_like(a.bias)) for a in maps]
        a, b, c = maps
        left, right = a.then(b).then(c), a.then(b.then(c))
        assert left.geometry == right.geometry
        torch.testing.assert_close(left.weight, right.weight, rtol=1e-11, atol=1e-11)

    @given(chains(3))
    def test_chains_associate(self, maps: list[Affine]) -> None:
        a, b, c = maps
        left, right = a.then(b).then(c), a.then(b.then(c))
        assert left.geometry == right.geometry
        torch.testing.assert_close(left.weight, right.weight, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(left.bias, right.bias, rtol=1e-11, atol=1e-11)

    @given(chains(1))
    def test_the_identity_changes_nothing_on_either_side(self, maps: list[Affine]) -> None:
        [a] = maps
        dims = len(a.geometry.axes)
        before = Affine.identity(a.geometry.in_channels, dims).then(a)
        after = a.then(Affine.identity(a.geometry.out_channels, dims))
        for found in (before, after):
            image, dims = image_for(a)
            assert replace(found.geometry, groups=a.geometry.groups) == a.geometry
            assert_same(run(found, image), run(a, image), dims)

    @pytest.mark.parametrize(
        ("first", "second", "groups"), [(12, 12, 12), (4, 2, 2), (2, 4, 2), (4, 6, 2), (6, 4, 2), (3, 4, 1), (1, 12, 1)]
    )
    def test_groups_stay_as_fine_as_both_allow(self, first: int, second: int, groups: int) -> None:
        axes = (Axis.convolution(3, 1, (1, 1), 1),)
        a = random_affine(Geometry(12, 12, axes, first, True), 1)
        b = random_affine(Geometry(12, 24, axes, second, True), 2)
        merged = a.then(b)
        assert merged.geometry.groups == groups
        assert merged.weight.shape == (24, 12 // groups, 5)
        image, dims = image_for(a)
        assert_same(run(merged, image), run(b, run(a, image)), dims)

    def test_channels_that_do_not_meet_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="^2 channels meet 3$"):
            Affine.identity(2, 2).then(Affine.identity(3, 2))


class TestPlus:
    @given(pairs(same_outputs=True))
    def test_a_sum_is_the_sum_of_what_both_make(self, pair: tuple[Affine, Affine]) -> None:
        a, b = pair
        image, dims = image_for(a)
        assert_same(run(a.plus(b), image), lambda w: run(a, image)(w) + run(b, image)(w), dims)

    @given(pairs(same_outputs=True))
    def test_sums_commute(self, pair: tuple[Affine, Affine]) -> None:
        a, b = pair
        left, right = a.plus(b), b.plus(a)
        assert left.geometry == right.geometry
        torch.testing.assert_close(left.weight, right.weight, rtol=0, atol=0)
        torch.testing.assert_close(left.bias, right.bias, rtol=0, atol=0)

    def test_paths_of_different_strides_are_an_error(self) -> None:
        strided = Affine.identity(2, 1).then(random_affine(Geometry(2, 2, (Axis(1, 2),))))
        with pytest.raises(ValueError, match="different strides meet"):
            strided.plus(Affine.identity(2, 1))


class TestConcat:
    @given(pairs(same_outputs=False))
    def test_a_concat_has_the_channels_of_one_then_of_the_other(self, pair: tuple[Affine, Affine]) -> None:
        a, b = pair
        image, dims = image_for(a)
        assert_same(run(a.concat(b), image), lambda w: torch.cat((run(a, image)(w), run(b, image)(w)), 1), dims)


class TestRegrouped:
    @given(chains(1), st.data())
    def test_fewer_groups_compute_the_same(self, maps: list[Affine], data: st.DataObject) -> None:
        [a] = maps
        mine = a.geometry.groups
        groups = data.draw(st.sampled_from([g for g in range(1, mine + 1) if mine % g == 0]))
        image, dims = image_for(a)
        again = a.regrouped(groups)
        assert again.geometry == replace(a.geometry, groups=groups)
        assert_same(run(again, image), run(a, image), dims)


class TestEvaluate:
    def test_an_expression_with_skips_and_branches_is_one_map(self) -> None:
        axis = Axis.convolution(3, 1, (1, 1), 1)
        wide = Axis.convolution(3, 1, (0, 4), 2)
        maps = {
            "a": random_affine(Geometry(4, 4, (axis, wide), 2, True), 1),
            "b": random_affine(Geometry(4, 4, (wide, axis)), 2),
            "c": random_affine(Geometry(4, 2, (axis, axis), bias=True), 3),
        }
        own = {name: affine.geometry for name, affine in maps.items()}
        steps = (
            Step("x", "entry", (), Geometry.identity(4, 2)),
            Step("a", "apply", (0,), own["a"]),
            Step("b", "apply", (1,), own["b"]),
            Step("add", "sum", (2, 0, 1)),
            Step("c", "apply", (3,), own["c"]),
            Step("cat", "concat", (4, 1, 0)),
        )
        image = noise(4, 2)
        a = run(maps["a"], image)
        b = run(maps["b"], a)
        c = run(maps["c"], lambda w: b(w) + image(w) + a(w))
        merged = evaluate(Expression(steps), maps)
        assert merged.geometry == Expression(steps).geometry
        assert_same(run(merged, image), lambda w: torch.cat((c(w), a(w), image(w)), 1), 2)

    def test_an_entry_alone_is_the_identity(self) -> None:
        merged = evaluate(Expression((Step("x", "entry", (), Geometry.identity(3, 2)),)), {})
        image = noise(3, 2)
        assert_same(run(merged, image), image, 2)


class TestAffine:
    def test_a_weight_of_another_shape_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"^4->4 3 needs a weight of \(4, 4, 3\), found \(4, 4, 5\)$"):
            Affine.of(Geometry(4, 4, (Axis(3),)), torch.zeros(4, 4, 5))

    def test_numbers_are_float64_and_outside_any_autograd_graph(self) -> None:
        weight = torch.ones(2, 2, 1, requires_grad=True)
        affine = Affine.of(Geometry(2, 2, (Axis(),)), weight * 2)
        assert affine.weight.dtype == affine.bias.dtype == torch.float64
        assert not affine.weight.requires_grad
        assert torch.equal(affine.bias, torch.zeros(2, dtype=torch.float64))

    def test_scaling_multiplies_and_shifts_every_channel(self) -> None:
        scale, shift = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
        image = noise(2, 3)
        by_hand = lambda w: image(w) * scale.view(1, 2, 1, 1, 1) + shift.view(1, 2, 1, 1, 1)  # noqa: E731 - one image
        assert_same(run(scaling(scale, shift, 3), image), by_hand, 3)


def test_a_long_chain_of_depthwise_maps_stays_depthwise() -> None:
    axis = Axis.convolution(3, 1, (1, 1), 1)
    maps = [random_affine(Geometry(8, 8, (axis,), 8, True), seed) for seed in range(4)]
    merged = reduce(Affine.then, maps)
    assert merged.geometry.depthwise
    assert merged.weight.shape == (8, 1, 9)
