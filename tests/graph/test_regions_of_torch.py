"""Blocks under autocast or checkpoint, and outputs in a dataclass: read, or refused by name, and computing the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fxmerge
from fxmerge.analysis.segments import find_segments
from fxmerge.core.segment import Reason
from fxmerge.errors import NotEquivalentError, TraceError
from fxmerge.graph.meta import front_end
from fxmerge.graph.trace import trace
from fxmerge.testing import assert_equivalent
from tests.fakes import PriceTimer
from tests.graph.test_capture import by_dynamo, by_program

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


def autocast_within(block: nn.Module, x: Tensor) -> Any:
    """Cast, and within that not."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block[0](x)
        with torch.autocast("cpu", enabled=False):
            y = block[2](block[1](y.float()))
    return y.float()


def without_gradients(block: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return block(x)


FORMS: list[Callable[[nn.Module, Tensor], GraphModule]] = [
    lambda model, x: trace(model, x, front_end="export"), by_program, by_dynamo
]  # fmt: skip


def computes_the_same(graph: GraphModule, model: nn.Module) -> bool:
    """TorchDynamo's graphs give a tuple."""
    with torch.no_grad():
        [found] = pytree.tree_leaves(graph(IMAGE))
        return torch.equal(found, model(IMAGE))


@pytest.mark.parametrize("form", FORMS, ids=["export", "program", "dynamo"])
@pytest.mark.parametrize("call", [not_reentrant, autocast_off, without_gradients])
def test_such_a_block_is_read_so_in_every_form(
    call: Callable[[nn.Module, Tensor], Any], form: Callable[[nn.Module, Tensor], GraphModule]
) -> None:
    model = Model(call).eval()
    graph = form(model, IMAGE)
    [x] = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    assert [str(segment).replace(f"{x} ->", "x ->") for segment in find_segments(graph).segments] == PLAIN
    assert set(graph.state_dict()) == set(model.state_dict())
    assert computes_the_same(graph, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_autocast_that_casts_nothing_is_no_region(dtype: torch.dtype) -> None:
    model = Model(lambda block, x: autocast_on(block, x).to(x.dtype)).eval().to(dtype)
    image = IMAGE.to(dtype)
    graph = trace(model, image, front_end="export")
    assert "wrap_with_autocast" not in {node.name for node in graph.graph.nodes}
    with torch.no_grad():
        assert torch.equal(graph(image), model(image))


@pytest.mark.parametrize("form", FORMS, ids=["export", "program", "dynamo"])
@pytest.mark.parametrize("call", [autocast_on, autocast_within])
def test_layers_in_a_region_under_autocast_are_refused_one_by_one_and_what_is_behind_it_merges(
    call: Callable[[nn.Module, Tensor], Any], form: Callable[[nn.Module, Tensor], GraphModule]
) -> None:
    model = Model(call).eval()
    graph = form(model, IMAGE)
    found = find_segments(graph)
    told = {refusal.target: refusal for refusal in found.refusals if refusal.reason is Reason.REGION}
    assert list(told) == ["block.0", "block.1", "block.2"]
    for refusal in told.values():
        assert refusal.node == "wrap_with_autocast"
        assert "autocast" in refusal.advice
        assert "test_regions_of_torch.py:" in refusal.source
    assert "wrap_with_autocast" in {refusal.node for refusal in found.refusals if refusal.reason is Reason.OPAQUE}
    assert "relu -> head" in map(str, found.segments)
    assert computes_the_same(graph, model)


def test_what_is_beside_a_region_in_a_region_is_merged_without_a_change_to_it() -> None:
    model = Model(autocast_within).eval()
    graph = trace(model, IMAGE, front_end="export")
    result = fxmerge.compress(model, IMAGE, speedup=1.1, calibration=IMAGE.repeat(8, 1, 1, 1), timer=PriceTimer())
    assert result.plan.merges
    assert_equivalent(result.student, result.model, [IMAGE])
    with torch.no_grad():
        assert torch.equal(graph(IMAGE), model(IMAGE))


def test_an_output_of_another_type_is_no_trace() -> None:
    """Symbolic tracing passes autocast by; where the values are near, their type still tells."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.a(x)

    model = Cast().eval()
    with pytest.raises(TraceError, match=r"gives torch\.float32 where the model gives torch\.bfloat16"):
        trace(model, IMAGE, front_end="symbolic_trace")
    graph = trace(model, IMAGE)
    assert front_end(graph) == "export"
    with torch.no_grad():
        assert graph(IMAGE).dtype == torch.bfloat16


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


class Sizes(NamedTuple):
    pooled: Tensor
    height: int


@dataclass(frozen=True)
class Level:
    mask: Tensor
    note: str
    sizes: Sizes


@dataclass
class Nested:
    levels: list[Level]
    logits: Tensor
    aside: dict[str, Tensor | None]


class BySize(nn.Module):
    """Symbolic tracing cannot: it looks at its size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, *images: Tensor) -> Nested:
        (x,) = images
        if x.shape[2] < 4:
            raise ValueError("too small")
        y = self.b(torch.relu(self.a(x)))
        level = Level(y, "a", Sizes(y.mean((2, 3)), 7))
        return Nested([level, level], self.c(torch.relu(y)), {"loss": None, "y": y})


def test_dataclasses_that_torch_export_does_not_know_come_back_and_stay_unknown() -> None:
    model = BySize().eval()
    known = len(pytree.SUPPORTED_NODES)
    graph = trace(model, IMAGE)
    assert front_end(graph) == "export"
    assert len(pytree.SUPPORTED_NODES) == known
    assert set(graph.state_dict()) == set(model.state_dict())
    assert {"images_0 -> b", "b -> c"} <= set(map(str, find_segments(graph).segments))
    other = torch.randn(3, 3, 17, 14, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = graph(other)
    assert isinstance(made, Nested)
    assert isinstance(made.levels[1], Level)
    assert isinstance(made.levels[1].sizes, Sizes)
    assert (made.levels[0].note, made.levels[0].sizes.height, made.aside["loss"]) == ("a", 7, None)
    assert_equivalent(model, graph, [IMAGE, other], tolerance=0.0)
    result = fxmerge.compress(model, IMAGE, speedup=1.1, calibration=IMAGE.repeat(8, 1, 1, 1), timer=PriceTimer())
    assert result.plan.merges
    assert isinstance(result.model(IMAGE), Nested)
    assert not model._forward_hooks


@dataclass
class Counted:
    y: Tensor
    count: int = field(init=False, default=3)


def test_a_dataclass_that_cannot_be_made_from_its_fields_is_told() -> None:
    class Model(BySize):
        def forward(self, *images: Tensor) -> Any:
            return Counted(super().forward(*images).logits)

    with pytest.raises(TraceError, match="an output in a Counted cannot be put together again"):
        trace(Model().eval(), IMAGE, front_end="export")


def test_a_dataclass_that_differs_is_told() -> None:
    model, other = Several().eval(), Several().eval()
    with pytest.raises(NotEquivalentError, match="the largest difference is"):
        assert_equivalent(model, other, [IMAGE])
