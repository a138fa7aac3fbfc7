"""Blocks under autocast or checkpoint, and outputs in a dataclass: read, or refused by name, and computing the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxmerge
from fxmerge.analysis.segments import find_segments
from fxmerge.core.segment import Reason
from fxmerge.errors import NotEquivalentError
from fxmerge.graph.meta import front_end
from fxmerge.graph.trace import trace
from fxmerge.testing import assert_equivalent
from tests.fakes import PriceTimer

IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
PLAIN = ["x -> block_1", "x -> relu", "x -> head", "block_1 -> relu", "block_1 -> head", "relu -> head"]


class Model(nn.Module):
    """Two convolutions with an activation between, called by something, then another one."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
        self.head, self.call = nn.Conv2d(3, 3, 3, padding=1), call

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.call(self.block, x)))
        return y


def reentrant(block: nn.Module, x: Tensor) -> Any:
    return checkpoint(block, x, use_reentrant=True)


def not_reentrant(block: nn.Module, x: Tensor) -> Any:
    return checkpoint(block, x, use_reentrant=False)


def autocast_off(block: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        return block(x)


def autocast_on(block: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    return y.float()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch's, of reentrant checkpoints
@pytest.mark.parametrize("call", [reentrant, not_reentrant, autocast_off])
def test_a_block_that_is_called_so_is_read_as_any_other(call: Callable[[nn.Module, Tensor], Any]) -> None:
    model = Model(call).eval()
    graph = trace(model, IMAGE)
    assert [str(segment) for segment in find_segments(graph).segments] == PLAIN
    with torch.no_grad():
        assert torch.equal(graph(IMAGE), model(IMAGE))


def test_a_region_under_autocast_is_refused_and_what_is_behind_it_merges() -> None:
    model = Model(autocast_on).eval()
    graph = trace(model, IMAGE)
    found = find_segments(graph)
    assert front_end(graph) == "export"
    assert any(refusal.reason is Reason.OPAQUE and "autocast" in refusal.node for refusal in found.refusals), found.refusals
    assert "relu -> head" in map(str, found.segments)
    with torch.no_grad():
        assert torch.equal(graph(IMAGE), model(IMAGE))


@dataclass
class Outputs:
    logits: Tensor
    features: dict[str, list[Tensor]]


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Outputs:
        y = self.b(torch.relu(self.a(x)))
        return Outputs(self.c(torch.relu(y)), {"last": [y]})


def test_outputs_nested_in_a_dataclass_stay_as_they_are_and_what_leads_to_them_merges() -> None:
    model = Several().eval()
    graph = trace(model, IMAGE)
    assert {"x -> b", "b -> c"} <= set(map(str, find_segments(graph).segments))
    with torch.no_grad():
        made = graph(IMAGE)
    assert isinstance(made, Outputs)
    assert_equivalent(model, graph, [IMAGE], tolerance=0.0)
    result = fxmerge.compress(model, IMAGE, speedup=1.1, calibration=IMAGE.repeat(8, 1, 1, 1), timer=PriceTimer())
    assert result.plan.merges
    assert isinstance(result.model(IMAGE), Outputs)
    assert_equivalent(result.student, result.model, [IMAGE])


def test_a_dataclass_that_differs_is_told() -> None:
    model, other = Several().eval(), Several().eval()
    with pytest.raises(NotEquivalentError, match="the largest difference is"):
        assert_equivalent(model, other, [IMAGE])
