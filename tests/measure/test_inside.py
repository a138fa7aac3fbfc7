"""Times here come from a clock that only layers move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.core.table import LatencyTable, Measurement, Target
from fxmerge.measure.inside import nanoseconds_inside
from fxmerge.measure.store import Store
from fxmerge.measure.timer import InterleavedTimer
from tests.small import images, network

MS = 1_000_000


class Clock:
    """Moved by every convolution, by so many milliseconds as it has output channels, and so many more where others ran before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, more: int = 0) -> None:
        self.ns, self.readings, self.fresh = 0, 0, True
        real = nn.Conv2d.forward

        def forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
            self.ns += layer.out_channels * MS + (0 if self.fresh else more * MS)
            self.fresh = False
            return real(layer, x)

        monkeypatch.setattr(nn.Conv2d, "forward", forward)

    def __call__(self) -> int:
        self.readings += 1
        self.fresh = True
        return self.ns


class Warm(Clock):
    """A clock that does not forget who ran before when it is read."""

    def __call__(self) -> int:
        fresh = self.fresh
        now = super().__call__()
        self.fresh = fresh
        return now


def found() -> tuple[fxmerge.Findings, tuple[fxmerge.Proposal, ...]]:
    findings = fxmerge.find_segments(fxmerge.trace(network(), images(4)))
    return findings, fxmerge.propose(findings)


def test_every_node_is_timed_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    findings, _ = found()
    graph = fxmerge.baseline(findings.graph)
    before = graph.code
    clock = Clock(monkeypatch)
    taken = nanoseconds_inside(graph, (images(4),), Target(), rounds=3, warmup=1, clock=clock)
    layers = {node.name: graph.get_submodule(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    convolutions = {name: layer.out_channels for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    assert len(convolutions) > 2
    assert taken.keys() == {node.name for node in graph.graph.nodes if node.op.startswith("call_")}
    assert taken == {name: [convolutions.get(name, 0) * MS] * 3 for name in taken}
    assert graph.code == before


@pytest.mark.parametrize("target", [Target(dtype="float64"), Target(channels_last=True)])
def test_other_dtypes_and_layouts_are_timed_too(target: Target) -> None:
    findings, _ = found()
    graph = fxmerge.baseline(findings.graph)
    timer = InterleavedTimer(rounds=2)
    taken = nanoseconds_inside(graph, (images(4),), target, rounds=2, warmup=1, clock=timer.clock)
    assert all(len(samples) == 2 and min(samples) > 0 for samples in taken.values())


def test_units_count_for_their_time_inside_and_candidates_for_theirs_at_that_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    findings, proposals = found()
    timer = InterleavedTimer(rounds=3, max_runs_per_sample=1, clock=Warm(monkeypatch, more=4))
    table = fxmerge.measure_latency(findings, proposals, images(4), timer=timer)
    assert set(table.inside) <= {unit.end for unit in findings.region.walk()}
    units = sum(table.unit_ns(end) for end in table.units)
    assert units == pytest.approx(table.network.median_ns, rel=1e-6)
    assert abs(table.remainder_ns) <= len(table.units)
    for name, ends in table.replaces.items():
        alone = sum(table.measurements[table.units[end]].median_ns for end in ends if end in table.units)
        within = sum(table.unit_ns(end) for end in ends)
        mine = table.measurements[table.candidates[name]].median_ns
        if alone and within:
            assert table.candidate_ns(name) == pytest.approx(mine * within / alone, rel=1e-6, abs=1)
    assert LatencyTable.from_json(table.to_json()) == table


def test_what_the_units_replaced_take_is_what_a_merge_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    findings, proposals = found()
    table = fxmerge.measure_latency(
        findings, proposals, images(4), timer=InterleavedTimer(rounds=3, max_runs_per_sample=1, clock=Clock(monkeypatch))
    )
    walked = {unit.end: unit for unit in findings.region.walk()}
    for proposal in proposals:
        for candidate in proposal.candidates:
            nodes = {name for end in table.replaces[candidate.id] for name in walked[end].nodes}
            assert set(proposal.segment.nodes) <= nodes


def test_a_store_keeps_times_inside(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found()
    clock = Clock(monkeypatch)
    timer = InterleavedTimer(rounds=3, max_runs_per_sample=1, clock=clock)
    with Store(tmp_path / "tables.db") as store:
        first = fxmerge.measure_latency(findings, proposals, images(4), timer=timer, store=store)
        readings = clock.readings
        assert first.inside
        assert fxmerge.measure_latency(findings, proposals, images(4), timer=timer, store=store) == first
        assert clock.readings == readings


def test_a_table_without_times_inside_goes_by_one_pace() -> None:
    measured = {name: Measurement(ns, 0, 3, Target()) for name, ns in (("a", 30), ("b", 50), ("merged", 40), ("whole", 60))}
    table = LatencyTable(measured, {"m": "merged"}, {"a": "a", "b": "b"}, measured["whole"])
    assert (table.unit_ns("a"), table.unit_ns("b"), table.candidate_ns("m")) == (23, 38, 30)
    inside = {name: replace(measured[name], median_ns=ns) for name, ns in (("a", 10), ("b", 20))}
    known = measured | {f"inside {name}": one for name, one in inside.items()}
    table = LatencyTable(
        known, {"m": "merged"}, {"a": "a", "b": "b"}, measured["whole"], {n: f"inside {n}" for n in "ab"}, {"m": ("b",)}
    )
    assert (table.unit_ns("a"), table.unit_ns("b"), table.candidate_ns("m")) == (20, 40, 32)


def test_compiled_networks_have_no_nodes_to_time() -> None:
    findings, proposals = found()
    asked: list[Sequence[object]] = []

    class Compiled(InterleavedTimer):
        def __call__(self, modules, *, target, progress=None):  # type: ignore[no-untyped-def]
            asked.append(modules)
            return tuple(Measurement(5, 0, 1, target) for _ in modules)

    table = fxmerge.measure_latency(findings, proposals, images(4), target=Target(backend="inductor"), timer=Compiled())
    assert asked
    assert not table.inside
    assert torch.is_inference_mode_enabled() is False
