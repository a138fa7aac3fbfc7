"""Least squares through an activation: never worse on the rows, exact where the truth is a convolution behind a ReLU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxmerge.algebra.affine import Affine
from fxmerge.algebra.least_squares import NormalEquations
from fxmerge.algebra.module import convolved
from fxmerge.algebra.through import Rows
from fxmerge.core.geometry import Axis, Geometry

GEOMETRY = Geometry(3, 4, (Axis.convolution(3, 1, (1, 1), 1), Axis.convolution(1, 1, (0, 0), 1)), 1, True)
GROUPED = Geometry(4, 6, (Axis.convolution(3, 2, (1, 1), 1),) * 2, 2, True)


def fits(geometry: Geometry, y: Tensor, x: Tensor, activation, rounds: int = 30) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """The error behind the activation of the plain solution, and of the one fitted through it."""
    equations = NormalEquations.empty(geometry)
    equations.add(x, {"y": y})
    factored = equations.factored(geometry, ridge=1e-8)
    plain = factored.affine(equations.targets["y"])
    rows = Rows(geometry, 1 << 30)
    assert rows.add(x, y, None)
    through = rows.fitted(factored, plain, activation, rounds=rounds)

    def error(affine: Affine) -> float:
        return float((activation(convolved(affine, x)) - activation(y)).square().mean())

    return error(plain), error(through)


@pytest.mark.parametrize("geometry", [GEOMETRY, GROUPED], ids=str)
@pytest.mark.parametrize("activation", [F.relu, F.relu6, F.silu, F.gelu, F.hardswish, lambda t: F.leaky_relu(t, 0.1)])
def test_what_lies_behind_the_activation_is_met_better_than_by_plain_least_squares(geometry, activation) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, geometry.in_channels, 9, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(6, geometry.out_channels, *geometry.outputs((9, 8)), generator=generator, dtype=torch.float64)
    plain, through = fits(geometry, y + x.mean(), x, activation)
    assert through < plain * 0.995


def test_a_target_that_is_cut_off_costs_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 3, 9, 8, generator=generator, dtype=torch.float64)
    truth = Affine.of(GEOMETRY, torch.randn(GEOMETRY.weight_shape, generator=generator), torch.zeros(4))
    y = convolved(truth, x)
    noisy = torch.where(y < 0, y - 5 * torch.rand(y.shape, generator=generator, dtype=y.dtype), y)
    plain, through = fits(GEOMETRY, noisy, x, F.relu, rounds=300)
    assert through < 0.01 * plain


def test_more_rows_than_the_memory_holds_are_not_taken() -> None:
    x, y = torch.randn(2, 3, 9, 8), torch.randn(2, 4, 9, 8)
    rows = Rows(GEOMETRY, 10_000)
    assert not rows.add(x, y, None)
    assert not rows.read
