"""Normal equations: they recover what made the data, add up over batches, and hold smaller kernels inside larger ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxmerge.algebra.affine import Affine
from fxmerge.algebra.least_squares import NormalEquations, covering, patches
from fxmerge.algebra.module import turned
from fxmerge.core.geometry import Axis, Geometry


def geometry(kernel: int, *, stride: int = 1, groups: int = 1, channels: int = 4) -> Geometry:
    pad = kernel // 2
    return Geometry(channels, channels, (Axis.convolution(kernel, stride, (pad, pad), 1),) * 2, groups, True)


def apply(affine: Affine, x: torch.Tensor) -> torch.Tensor:
    g = affine.geometry
    pads = [amount for pair in reversed(g.padding) for amount in pair]
    return F.conv2d(F.pad(x, pads), affine.weight, affine.bias, g.stride, 0, g.dilation, g.groups)


def random_affine(g: Geometry) -> Affine:
    return Affine.of(g, torch.randn(g.weight_shape), torch.randn(g.out_channels))


@pytest.mark.parametrize(("kernel", "padding", "spare", "groups"), [(4, 1, 0, 1), (2, 0, 0, 2), (3, 1, 1, 4), (5, 0, 1, 1)])
def test_a_transposed_convolution_is_recovered_as_well(kernel: int, padding: int, spare: int, groups: int) -> None:
    axis = Axis.transposed(kernel, 2, padding, spare, 1)
    true = random_affine(Geometry(4, 4, (axis, axis), groups, True, even=False))
    equations = NormalEquations.empty(true.geometry)
    weight = turned(true.weight, groups)
    for _ in range(3):
        x = torch.randn(6, 4, 9, 8, dtype=torch.float64)
        equations.add(x, {"y": F.conv_transpose2d(x, weight, true.bias, 2, padding, spare, groups)})
    found = equations.solve("y", true.geometry, ridge=1e-14)
    assert torch.allclose(found.weight, true.weight, atol=1e-8)
    assert torch.allclose(found.bias, true.bias, atol=1e-8)


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(3, 1, 1), (3, 2, 1), (1, 1, 1), (5, 1, 2), (3, 1, 4)])
def test_a_convolution_is_recovered_from_its_inputs_and_outputs(kernel: int, stride: int, groups: int) -> None:
    true = random_affine(geometry(kernel, stride=stride, groups=groups))
    equations = NormalEquations.empty(true.geometry)
    for _ in range(3):
        x = torch.randn(6, 4, 11, 12, dtype=torch.float64)
        equations.add(x, {"y": apply(true, x)})
    found = equations.solve("y", true.geometry, ridge=1e-14)
    assert torch.allclose(found.weight, true.weight, atol=1e-8)
    assert torch.allclose(found.bias, true.bias, atol=1e-8)


def test_patches_are_what_a_convolution_reads() -> None:
    affine = random_affine(geometry(3, stride=2, groups=2))
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    rows = patches(x, affine.geometry)
    y = torch.einsum("grm,gom->rgo", rows, affine.weight.reshape(2, 2, -1)).flatten(1) + affine.bias
    assert torch.allclose(y, apply(affine, x).movedim(1, -1).flatten(0, -2))


def test_a_smaller_kernel_is_solved_from_the_larger_ones_sums() -> None:
    small, large = geometry(3), geometry(7)
    x, y = torch.randn(8, 4, 12, 12, dtype=torch.float64), torch.randn(8, 4, 12, 12, dtype=torch.float64)
    own, shared = NormalEquations.empty(small), NormalEquations.empty(covering([small, large]))
    own.add(x, {"y": y})
    shared.add(x, {"y": y})
    assert torch.allclose(own.solve("y", small).weight, shared.solve("y", small).weight, atol=1e-9)


def test_the_solution_is_a_minimum_of_the_penalised_error() -> None:
    g = geometry(3)
    x, y = torch.randn(4, 4, 8, 8, dtype=torch.float64), torch.randn(4, 4, 8, 8, dtype=torch.float64)
    prior = random_affine(g)
    equations = NormalEquations.empty(g)
    equations.add(x, {"y": y})
    best = equations.solve("y", g, ridge=0.1, prior=prior)
    strength = 0.1 * equations.gram[0].diagonal()[:-1].mean()

    def loss(weight: torch.Tensor) -> float:
        error = (apply(Affine(g, weight, best.bias), x) - y).square().sum()
        return float(error + strength * (weight - prior.weight).square().sum())

    least = loss(best.weight)
    for _ in range(20):
        assert loss(best.weight + 1e-3 * torch.randn_like(best.weight)) > least


def test_data_without_variation_is_solved_all_the_same() -> None:
    g = geometry(3)
    equations = NormalEquations.empty(g)
    equations.add(torch.zeros(2, 4, 6, 6), {"y": torch.ones(2, 4, 6, 6)})
    found = equations.solve("y", g)
    assert torch.allclose(found.bias, torch.ones(4, dtype=torch.float64))
    assert bool(torch.isfinite(found.weight).all())


def test_a_wide_gram_matrix_is_made_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    g, x = geometry(3, groups=2), torch.randn(3, 4, 6, 7, dtype=torch.float64)
    shares = torch.tensor([1.0, 0.5, 2.0])
    whole = NormalEquations.empty(g)
    whole.add(x, {"y": x}, shares=shares)
    monkeypatch.setattr("fxmerge.algebra.least_squares._BLOCK", 4)
    blocks = NormalEquations.empty(g)
    blocks.add(x, {"y": x}, shares=shares)
    assert whole.gram.shape[-1] == 19
    torch.testing.assert_close(blocks.gram, whole.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(blocks.gram, blocks.gram.mT, rtol=1e-12, atol=1e-12)
