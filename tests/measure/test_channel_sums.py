"""The scale and shift of every channel that come nearest to a norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxmerge.measure.channel_sums import ChannelSums


def pair(count: int = 6, dims: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dims)
    shape = (count, 3, *(5, 4, 3)[:dims])
    x, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x + 2, 3 * x + noise - 1


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_it_is_the_least_squares_line_of_every_channel(dims: int) -> None:
    x, y = pair(dims=dims)
    sums = ChannelSums()
    sums.add(x[:2], y[:2])
    sums.add(x[2:], y[2:])
    found = sums.solve()
    assert found.geometry.kernel == (1,) * dims
    for channel in range(3):
        columns = torch.stack((x[:, channel].flatten(), torch.ones(x[:, channel].numel(), dtype=torch.float64)), 1)
        scale, shift = torch.linalg.lstsq(columns, y[:, channel].reshape(-1, 1)).solution.flatten()
        assert float(found.weight.flatten()[channel]) == pytest.approx(float(scale), rel=1e-9)
        assert float(found.bias[channel]) == pytest.approx(float(shift), rel=1e-9)


def test_a_channel_that_does_not_vary_becomes_the_mean_wanted() -> None:
    x, y = pair()
    x[:, 1] = 7.0
    sums = ChannelSums()
    sums.add(x, y)
    found = sums.solve()
    assert float(found.weight.flatten()[1]) == 0.0
    assert float(found.bias[1]) == pytest.approx(float(y[:, 1].mean()), rel=1e-9)


def test_an_image_counts_for_its_share() -> None:
    x, y = pair()
    weighted, twice = ChannelSums(), ChannelSums()
    weighted.add(x, y, torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 0.0]))
    twice.add(torch.cat((x[:1], x[:5])), torch.cat((y[:1], y[:5])))
    assert torch.allclose(weighted.solve().weight, twice.solve().weight)
    assert torch.allclose(weighted.solve().bias, twice.solve().bias)
