"""What is counted for a plan is what its merged network has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from fxmerge.core.resource import Resource
from fxmerge.core.table import Importance, ImportanceTable
from fxmerge.graph.query import module_of
from fxmerge.measure.resources import count_resource
from fxmerge.search import build_networks
from tests.fakes import PriceTimer


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm, self.b = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.skip(x) + self.b(torch.relu(self.norm(self.a(x)))))


def network() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), Block(4, 4), nn.MaxPool2d(2), Block(4, 8, 2), *head).eval()


class Alive(Interpreter):
    """Runs a graph and keeps count of the bytes that are alive, an activation or addition in place taking none."""

    peak = 0

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        held = {
            id(t): t.numel() * t.element_size() for n, t in self.env.items() if isinstance(t, torch.Tensor) and n.op != "get_attr"
        }
        if isinstance(result, torch.Tensor) and node.op not in ("get_attr", "output"):
            held[id(result)] = result.numel() * result.element_size()
            assert isinstance(self.module, GraphModule)
            over = node.all_input_nodes and len(node.all_input_nodes[0].users) == 1
            if (
                isinstance(module_of(self.module, node), nn.ReLU) or node.target in (torch.relu, torch.nn.functional.relu)
            ) and over:
                held.pop(id(self.env[node.all_input_nodes[0]]), None)
        self.peak = max(self.peak, sum(held.values()))
        return result


def truth(name: str, merged: GraphModule, example: torch.Tensor) -> int:
    if name == "parameters":
        return sum(p.numel() for p in merged.parameters())
    with torch.no_grad():
        if name == "multiply_adds":
            with FlopCounterMode(display=False) as counter:
                merged(example)
            return int(counter.get_total_flops()) // 2 // len(example)
        runner = Alive(merged)
        runner.run(example)
        return runner.peak


def fronts(model: nn.Module, name: str, example: torch.Tensor) -> tuple[fxmerge.Findings, fxmerge.ParetoFront]:
    findings = fxmerge.find_segments(fxmerge.trace(model, example))
    proposals = fxmerge.propose(findings)
    latency = fxmerge.measure_latency(findings, proposals, (example,), timer=PriceTimer())
    candidates = [c for p in proposals for c in p.candidates]
    importance = ImportanceTable({c.id: Importance(1 / math.prod(c.geometry.weight_shape), 1, "") for c in candidates})
    resource = count_resource(findings, proposals, name)  # type: ignore[arg-type]
    return findings, fxmerge.solve(findings.region, candidates, latency, importance, findings.fingerprint, second=resource)


@pytest.mark.parametrize("name", ["parameters", "multiply_adds", "peak_bytes"])
def test_a_plan_takes_what_its_merged_network_takes(name: str) -> None:
    example = torch.randn(2, 3, 17, 20)
    findings, front = fronts(network(), name, example)
    assert len(front) > 5
    seen = set()
    for index in range(0, len(front), max(1, len(front) // 12)):
        plan = front.plan(index)
        _, merged = build_networks(findings, plan, {})
        found = truth(name, merged, example)
        if name == "peak_bytes" and any(m.kind == "identity" for m in plan.merges):
            assert found <= front.amounts[index]
        else:
            assert found == front.amounts[index], plan
        seen.add(front.amounts[index])
    assert len(seen) >= 2


class Perceptron(nn.Module):
    """ConvNeXt's: linear layers on channels last, between images with channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.narrow(torch.relu(self.wide(self.stem(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return torch.relu(y)


ENLARGING = {
    "transposed": (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.ReLU()),
    "transposed and more": (nn.ConvTranspose2d(3, 4, 2, 2, bias=False), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    "nearest": (nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()),
    "channels last": (Perceptron(),),
}


@pytest.mark.parametrize("network", ENLARGING)
@pytest.mark.parametrize("name", ["multiply_adds", "peak_bytes"])
def test_so_it_does_where_images_become_larger_or_have_channels_last(network: str, name: str) -> None:
    example = torch.randn(2, 3, 9, 14)
    findings, front = fronts(nn.Sequential(*ENLARGING[network]).eval(), name, example)
    plans = [front.plan(index) for index in range(len(front))]
    assert any(merge.kind != "identity" for plan in plans for merge in plan.merges)
    for plan, amount in zip(plans, front.amounts, strict=True):
        assert truth(name, build_networks(findings, plan, {})[1], example) == amount, plan


def test_the_peak_of_a_chain_is_by_hand_that_of_its_widest_step() -> None:
    """Bytes: input 4*64, wide 16*64, narrow 2*64 numbers of 4; a padded copy is taken where padding is uneven."""
    model = nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1)).eval()
    findings = fxmerge.find_segments(fxmerge.trace(model, torch.randn(1, 4, 8, 8)))
    proposals = fxmerge.propose(findings)
    peak = count_resource(findings, proposals, "peak_bytes")
    assert peak.largest
    assert sorted(n for n in peak.units.values() if n) == [256 * 18, 256 * 20]
    whole = [c for p in proposals for c in p.candidates if c.activations]
    assert {peak.candidates[c.id] for c in whole} == {256 * 6}


def test_where_a_kernel_cannot_pad_by_itself_a_padded_copy_of_the_entry_is_alive_too() -> None:
    model = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 16, 2), nn.ReLU(), nn.Conv2d(16, 2, 1)).eval()
    findings = fxmerge.find_segments(fxmerge.trace(model, torch.randn(1, 4, 8, 8)))
    proposals = fxmerge.propose(findings, fxmerge.Space(fitted=False))
    peak = count_resource(findings, proposals, "peak_bytes")
    (whole,) = {c.id for p in proposals for c in p.candidates if c.activations and c.entry == findings.segments[0].entry}
    assert peak.candidates[whole] == 4 * (4 * 64 + 4 * 81 + 2 * 64)


def whole_peak(model: nn.Module, entry: str = "") -> int:
    findings = fxmerge.find_segments(fxmerge.trace(model.eval(), torch.randn(1, 3, 5, 8)))
    proposals = fxmerge.propose(findings, fxmerge.Space(fitted=False, prune=False, identity=False))
    peak = count_resource(findings, proposals, "peak_bytes")
    mine = [p for p in proposals if p.segment.entry == (entry or findings.segments[0].entry)]
    [whole] = max(mine, key=lambda p: len(p.segment.nodes)).candidates
    return peak.candidates[whole.id]


def test_a_transposed_kernel_takes_a_copy_only_where_torchs_own_cannot_pad_and_of_the_size_that_it_needs() -> None:
    layers = nn.ConvTranspose2d(3, 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)
    assert whole_peak(nn.Sequential(*layers)) == 4 * (3 * 5 * 8 + 2 * 10 * 16)
    assert whole_peak(nn.Sequential(nn.ZeroPad2d((1, 0, 0, 2)), *layers)) == 4 * (3 * 5 * 8 + 3 * 7 * 9 + 2 * 14 * 18)


def test_a_padded_copy_of_a_tensor_with_channels_last_is_larger_in_space() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 4)
            self.conv = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 2)), nn.Conv2d(4, 2, (3, 2)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.sigmoid(self.one(x.permute(0, 2, 3, 1)))
            return self.conv(torch.relu(self.two(hidden)).permute(0, 3, 1, 2))  # type: ignore[no-any-return]

    assert whole_peak(Last(), "sigmoid") == 4 * (6 * 5 * 8 + 6 * 7 * 9 + 2 * 5 * 8)


def test_another_resource_is_refused() -> None:
    findings = fxmerge.find_segments(fxmerge.trace(network(), torch.randn(1, 3, 16, 16)))
    with pytest.raises(fxmerge.InputError, match="resource is 'watts'; give one of parameters, multiply_adds, peak_bytes"):
        count_resource(findings, (), "watts")  # type: ignore[arg-type]
    assert isinstance(count_resource(findings, (), "parameters"), Resource)


@pytest.mark.parametrize(("activation", "steps"), [(nn.ReLU(), 1), (nn.GELU(), 2)])
def test_an_activation_put_behind_takes_an_output_of_its_own_where_torch_cannot_write_over_its_operand(
    activation: nn.Module, steps: int
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), activation, nn.Conv2d(8, 8, 1))
    findings = fxmerge.find_segments(fxmerge.trace(model.eval(), torch.randn(1, 3, 5, 8)))
    proposals = fxmerge.propose(findings, fxmerge.Space(added=True))
    peak = count_resource(findings, proposals, "peak_bytes")
    added = next(c for p in proposals for c in p.candidates if c.added and c.kind == "fitted")
    assert peak.candidates[added.id] == 4 * 40 * max(3 + 8, 8 * steps)
