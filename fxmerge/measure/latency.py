"""The latency table: what every candidate costs, and every unit left alone, on the target.

What is timed is what will be built: the convolution with the activation kept behind it; for a unit left alone, its own nodes of
the folded original. Equal work at equal shapes is measured once. The whole folded original is measured beside, so that what the
table does not hold can be carried as a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxmerge.algebra.module import convolution, separate_padding
from fxmerge.analysis.segments import Findings
from fxmerge.core.region import Unit
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.core.table import LatencyTable, Measurement, Target
from fxmerge.graph.edit import shape_after
from fxmerge.graph.extract import extract, signature
from fxmerge.graph.query import node_named
from fxmerge.measure.timer import InterleavedTimer, Timed, Timer, compare
from fxmerge.passes.base import Sequential
from fxmerge.passes.drop_repeated import IDEMPOTENT
from fxmerge.passes.fold_batchnorm import FoldBatchNorm
from fxmerge.passes.reuse_memory import ReuseMemory


def baseline(graph: GraphModule) -> GraphModule:
    """The original as it is compared with: batch norms folded, activations in place where the tracer made them functional."""
    return Sequential((FoldBatchNorm(), ReuseMemory())).apply(graph)


def measure_latency(
    findings: Findings,
    proposals: Sequence[Proposal],
    example_inputs: Sequence[Any],
    *,
    target: Target | None = None,
    timer: Timer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Measure every candidate, every unit that a candidate could replace, and the whole folded original.

    Args:
        findings: segments of the traced graph.
        proposals: candidates to measure.
        example_inputs: the network's inputs, of the batch and image size to measure for: those the graph was traced with.
        target: device, dtype, layout, back end, threads; None for the CPU as it is.
        timer: what measures, single modules and the whole; None for :class:`InterleavedTimer` and :func:`compare`.
        progress: called with (done, total) measurements.

    Returns:
        The table; candidates that cost nothing (they leave no node) have a measurement of 0.
    """
    target = target or Target()
    work: dict[str, Timed | None] = {}
    folded = baseline(findings.graph)
    candidates: dict[str, str] = {}
    for proposal in proposals:
        for candidate in proposal.candidates:
            candidates[candidate.id] = _enter(work, *_candidate_module(folded, candidate))
    units: dict[str, str] = {}
    for unit, nodes in _replaceable_units(folded, findings.region, proposals):
        units[unit.end] = _enter(work, *extract(folded, nodes))
    keys = [key for key, timed in work.items() if timed is not None]
    found = (timer or InterleavedTimer())([work[key] for key in keys], target=target, progress=progress)  # type: ignore[misc]
    network = (timer or compare)([Timed(folded, tuple(example_inputs))], target=target)[0]
    measurements = dict(zip(keys, found, strict=True))
    nothing = Measurement(0, 0, 0, target, network.versions)
    return LatencyTable({key: measurements.get(key, nothing) for key in work}, candidates, units, network)


def _enter(work: dict[str, Timed | None], part: GraphModule, shapes: tuple[tuple[int, ...], ...]) -> str:
    key = signature(part, shapes)
    if key not in work:
        empty = all(node.op in ("placeholder", "output") for node in part.graph.nodes)
        work[key] = None if empty else Timed(part, shapes)
    return key


def _candidate_module(graph: GraphModule, candidate: Candidate) -> tuple[GraphModule, tuple[tuple[int, ...], ...]]:
    """What stands in the network when the candidate is taken: the convolution, and the activation it keeps."""
    entry = node_named(graph, candidate.entry)
    assert entry is not None
    part = Graph()
    last = part.placeholder("x")
    modules: dict[str, nn.Module] = {}
    if candidate.kind != "identity":
        amounts = separate_padding(candidate.geometry)
        if amounts:
            last = part.call_function(F.pad, (last, amounts))
        modules["convolution"] = convolution(candidate.geometry, device="cpu")
        last = part.call_module("convolution", (last,))
    for node in _kept_activations(graph, candidate):
        if candidate.kind == "identity" and node.target is entry.target and node.target in IDEMPOTENT:
            continue
        operand = last
        last = part.node_copy(node, lambda _, operand=operand: operand)  # type: ignore[misc]
    part.output(last)
    return GraphModule(modules, part), (shape_after(entry),)


def _kept_activations(graph: GraphModule, candidate: Candidate) -> list[Node]:
    kept: list[Node] = []
    node = node_named(graph, candidate.end)
    while node is not None and node.name != candidate.exit:
        kept.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    return kept


def _replaceable_units(graph: GraphModule, region: Unit, proposals: Sequence[Proposal]) -> Iterator[tuple[Unit, list[Node]]]:
    """The units that some candidate replaces, with their own nodes in the folded graph."""
    replaceable = {name for proposal in proposals for name in proposal.segment.nodes}
    named: Mapping[str, Node] = {node.name: node for node in graph.graph.nodes}
    for unit in region.walk():
        nodes = [named[name] for name in unit.nodes if name in named]
        if nodes and replaceable.issuperset(unit.nodes):
            yield unit, nodes


def worthwhile(proposals: Sequence[Proposal], table: LatencyTable, region: Unit) -> tuple[Proposal, ...]:
    """The candidates that are faster than leaving their stretch alone; no other can be in a best plan."""
    alone: dict[tuple[str, str], int] = {}
    for unit in region.walk():
        for chain in unit.children:
            costs = [sum(table.unit_ns(u.end) for u in below.walk()) for below in chain.units]
            for start in range(len(costs)):
                for stop in range(start + 1, len(costs) + 1):
                    alone[chain.cuts[start], chain.cuts[stop]] = sum(costs[start:stop])
    kept = []
    for proposal in proposals:
        limit = alone[proposal.segment.entry, proposal.segment.end]
        faster = tuple(c for c in proposal.candidates if table.candidate_ns(c.id) < limit)
        if faster:
            kept.append(Proposal(proposal.segment, faster))
    return tuple(kept)
