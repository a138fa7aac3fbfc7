"""torch.compile(model, backend="fxmerge"): found without an import, merges what is exact and pays, never computes stale weights."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from fxmerge.backend import fxmerge

EAGER = {"inner": "eager"}


class Branches(nn.Module):
    """A RepVGG block in its training form."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.three, self.bn3 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.one, self.bn1 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.bn0 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn3(self.three(x)) + self.bn1(self.one(x)) + self.bn0(x))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def model() -> nn.Module:
    made = nn.Sequential(Branches(), Branches()).train()
    made(torch.randn(4, 16, 8, 8))
    return made.eval()


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def test_the_backend_is_registered_without_an_import() -> None:
    assert "fxmerge" in torch._dynamo.list_backends(None)


def test_branches_are_merged_and_the_result_is_the_same(caplog: pytest.LogCaptureFixture) -> None:
    network, x = model(), torch.randn(8, 16, 24, 24)
    compiled = torch.compile(network, backend=fxmerge, options=EAGER)
    with caplog.at_level(logging.INFO, logger="fxmerge.backend"), torch.no_grad():
        found = compiled(x)
    assert close(found, network(x))
    assert "2 exact merges" in caplog.text


def test_weights_that_change_afterwards_are_never_ignored(caplog: pytest.LogCaptureFixture) -> None:
    network, x = model(), torch.randn(8, 16, 24, 24)
    compiled = torch.compile(network, backend=fxmerge, options=EAGER)
    with torch.no_grad():
        compiled(x)
        for parameter in network.parameters():
            parameter.mul_(1.5)
        assert close(compiled(x), network(x))
    assert "weights changed after compiling" in caplog.text


def test_nothing_is_merged_where_gradients_are_wanted(caplog: pytest.LogCaptureFixture) -> None:
    network, x = model(), torch.randn(2, 16, 8, 8)
    compiled = torch.compile(network, backend=fxmerge, options=EAGER)
    with caplog.at_level(logging.INFO, logger="fxmerge.backend"):
        compiled(x).sum().backward()
    assert network[0].three.weight.grad is not None  # type: ignore[index,union-attr]
    assert "gradients are wanted" in caplog.text


def test_a_network_without_convolutions_is_compiled_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    network, x = nn.Linear(4, 4), torch.randn(2, 4)
    compiled = torch.compile(network, backend=fxmerge, options=EAGER)
    with caplog.at_level(logging.INFO, logger="fxmerge.backend"), torch.no_grad():
        assert torch.equal(compiled(x), network(x))
    assert "nothing is merged" in caplog.text
