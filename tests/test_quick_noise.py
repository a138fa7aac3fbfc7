"""Quick initialisation: every value is drawn, as often as it is repeated, and small or scattered tensors are as ever."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxmerge.quick_noise import DRAWN, QuickNoise


@given(st.one_of(st.integers(1, 3 * DRAWN), st.sampled_from([DRAWN - 1, DRAWN, DRAWN + 1, 2 * DRAWN, 3 * DRAWN - 1])))
def test_tensors_of_any_size_are_filled_by_repeating(size: int) -> None:
    tensor = torch.full((size,), math.nan)
    with QuickNoise():
        assert tensor.uniform_(1, 2) is tensor
    assert bool(((tensor >= 1) & (tensor <= 2)).all())
    assert torch.equal(tensor[DRAWN:], tensor[: max(0, size - DRAWN)])


def test_layers_are_initialised_as_wide_as_ever() -> None:
    def widths() -> list[float]:
        torch.manual_seed(0)
        layer = nn.Conv2d(256, 256, 3)
        spread = float(layer.weight.detach().std())
        nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        return [spread, float(layer.weight.detach().std())]

    with QuickNoise():
        quick = widths()
    assert all(abs(a / b - 1) < 0.02 for a, b in zip(quick, widths(), strict=True))


def test_small_and_scattered_tensors_are_drawn_as_ever() -> None:
    def drawn() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [torch.empty(1000).normal_(), torch.empty(600, 600).t()[:, ::2].normal_(), nn.Linear(20, 30).weight]

    with QuickNoise():
        quick = drawn()
    assert all(map(torch.equal, quick, drawn()))
