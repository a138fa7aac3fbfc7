"""The one builder of modules: against a map's numbers, in every dtype and memory format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fxmerge.algebra.module import convolution, convolution_with, convolved, separate_padding
from fxmerge.core.geometry import Axis, Geometry
from tests.algebra.test_affine import enlarging, noise, random_affine, run


def padded(*pads: tuple[int, int], **options: Any) -> Geometry:
    return Geometry(4, 4, tuple(Axis.convolution(3, 2, pad, 2) for pad in pads), **options)


@pytest.mark.parametrize(
    ("pads", "amounts"),
    [
        ([(1, 1), (0, 0)], ()),
        ([(1, 1), (2, 3)], (2, 3, 1, 1)),
        ([(-1, -1), (2, 2)], (2, 2, -1, -1)),
        ([(0, 1)], (0, 1)),
        ([(0, 1), (2, 2), (3, 3)], (3, 3, 2, 2, 0, 1)),
    ],
)
def test_only_even_padding_is_left_to_the_convolution(pads: list[tuple[int, int]], amounts: tuple[int, ...]) -> None:
    assert separate_padding(padded(*pads)) == amounts


@pytest.mark.parametrize("pads", [[(4, 4)], [(2, 1), (4, 4)], [(-1, 2), (-1, -2)], [(1, 0), (2, 2), (3, 3)]])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_the_map_borders_included(pads: list[tuple[int, int]], bias: bool) -> None:
    geometry = padded(*pads, groups=2, bias=bias)
    affine = random_affine(geometry)
    module = convolution_with(affine, like=torch.zeros(1, dtype=torch.float64), bias=bias)
    sizes = (11, 12, 9)[: len(pads)]
    inside = noise(4, len(pads))(tuple((0, n) for n in sizes))
    outside = F.pad(inside, (30, 30) * len(pads))
    expected = run(affine, lambda window: outside[(..., *(slice(a + 30, b + 30) for a, b in window))])
    found = module(F.pad(inside, separate_padding(geometry)))
    torch.testing.assert_close(found, expected(tuple((0, n) for n in geometry.outputs(sizes))), rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 3))
def test_a_map_that_makes_the_image_larger_is_a_transposed_convolution_borders_included(data: st.DataObject, dims: int) -> None:
    affine = data.draw(enlarging(dims, 4, 0, tuple(data.draw(st.integers(2, 3)) for _ in range(dims))))
    geometry, sizes = affine.geometry, (4, 5, 3)[:dims]
    assume(all(n > 0 for n in geometry.outputs(sizes)))
    inside = noise(4, dims)(tuple((0, n) for n in sizes))
    outside = F.pad(inside, (20, 20) * dims)
    expected = run(affine, lambda window: outside[(..., *(slice(a + 20, b + 20) for a, b in window))])
    whole = expected(tuple((0, n) for n in geometry.outputs(sizes)))
    module = convolution_with(affine, like=affine.weight, bias=geometry.bias)
    assert type(module) is {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    torch.testing.assert_close(module(F.pad(inside, separate_padding(geometry) or (0, 0))), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(convolved(affine, inside), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dims", "kind"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_dimensions_choose_the_convolution(dims: int, kind: type[nn.Module]) -> None:
    assert type(convolution(Geometry.identity(2, dims))) is kind


def test_it_takes_dtype_and_memory_format_from_its_model() -> None:
    affine = random_affine(Geometry(4, 8, (Axis(3), Axis(3))))
    like = torch.zeros(2, 3, 3, 3, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    module: Any = convolution_with(affine, like=like)
    assert module.weight.dtype == module.bias.dtype == torch.float16
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert not module.weight.is_contiguous()


def test_it_shares_no_memory_with_the_map() -> None:
    affine = random_affine(Geometry(4, 8, (Axis(3), Axis(3))))
    module: Any = convolution_with(affine, like=affine.weight)
    before = affine.weight.clone()
    module.weight.data.zero_()
    assert torch.equal(affine.weight, before)


def test_without_a_bias_there_is_none() -> None:
    module: Any = convolution_with(random_affine(Geometry(2, 2, (Axis(),))), like=torch.zeros(1), bias=False)
    assert module.bias is None
    assert module.weight.requires_grad
