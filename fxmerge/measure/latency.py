"""The latency table: what every candidate costs, and every unit left alone, on the target.

What is timed is what will be built: the convolution with the activation kept behind it; for a unit left alone, its own nodes of
the folded original. Equal work at equal shapes is measured once. The whole folded original is measured beside, so that what the
table does not hold can be carried as a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fxmerge.algebra.module import convolution
from fxmerge.analysis.segments import Findings
from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.region import Chain, Unit
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.core.table import LatencyTable, Measurement, Target
from fxmerge.errors import InputError, StoreError
from fxmerge.graph.edit import shape_after
from fxmerge.graph.extract import extract, signature
from fxmerge.graph.layout import turn
from fxmerge.graph.meta import facts, record
from fxmerge.graph.query import module_of, node_named
from fxmerge.graph.trace import as_arguments
from fxmerge.measure.inside import nanoseconds_inside
from fxmerge.measure.running import alone_on, versions
from fxmerge.measure.store import Store, place_of
from fxmerge.measure.study import digest
from fxmerge.measure.timer import InterleavedTimer, Timed, Timer, summary
from fxmerge.operators import Operators, default_operators, is_linear, norm_behind, write_map
from fxmerge.passes.base import Sequential
from fxmerge.passes.drop_repeated import IDEMPOTENT
from fxmerge.passes.fold_batchnorm import FoldBatchNorm
from fxmerge.passes.reuse_memory import ReuseMemory


def baseline(graph: GraphModule, *, operators: Operators | None = None) -> GraphModule:
    """The original as it is compared with: batch norms folded, activations in place where the tracer made them functional."""
    table = operators or default_operators()
    return Sequential((FoldBatchNorm(table), ReuseMemory(table))).apply(graph)


def measure_latency(
    findings: Findings,
    proposals: Sequence[Proposal],
    example_inputs: Any,
    *,
    target: Target | None = None,
    timer: Timer | None = None,
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Measure every candidate, every unit that a candidate could replace, and the whole folded original.

    Args:
        findings: segments of the traced graph.
        proposals: candidates to measure.
        example_inputs: a tensor, or the tuple of arguments, of the batch and image size to measure for: those of the trace.
        target: device, dtype, layout, back end, threads; None for the CPU as it is.
        timer: what measures, single modules and the whole; None for :class:`InterleavedTimer`.
        store: where measurements are written as they come; what it holds is not measured again. On a machine whose speed drifts,
            parts measured on another day, or for another network, fit the whole less well than those timed in turn with it.
        progress: called with (done, total) measurements.

    Returns:
        The table; candidates that cost nothing (they leave no node) have a measurement of 0.

    Raises:
        InputError: the timer gives something else than a measurement for each module, or 0 for the whole network.
        StoreError: the store cannot be read or written, or holds what is no latency.
    """
    target = target or Target()
    work: dict[str, Timed | None] = {}
    folded = _parts(findings)
    candidates: dict[str, str] = {}
    with torch.random.fork_rng(devices=[]):  # layers are initialised, on the CPU
        for proposal in proposals:
            for candidate in proposal.candidates:
                sides = proposal.segment.expression.sides
                candidates[candidate.id] = _enter(work, *_candidate_module(folded, candidate, sides, findings.operators))
    units: dict[str, str] = {}
    replaceable = {name for proposal in proposals for name in proposal.segment.nodes}
    for unit, nodes in _units(folded, findings.region):
        part, shapes = extract(folded, nodes)
        if replaceable.issuperset(unit.nodes) or _runs_alone(part, shapes):
            units[unit.end] = _enter(work, part, shapes)
    # The whole is timed in turn with its parts: a machine that is slow just then is so for both.
    whole = Timed(baseline(findings.graph, operators=findings.operators), as_arguments(example_inputs), thorough=True)
    whole_key = _whole_key(whole)
    parts = {whole_key: whole} | {key: timed for key, timed in work.items() if timed is not None}
    timer = timer or InterleavedTimer()
    measurements = _timed(parts, timer, target, store, progress)
    original = measurements.pop(whole_key)
    if original.median_ns < 1 and store is not None:
        text = f"table latency, the row of {whole_key!r:.80}: median_ns is 0, expected 1 or more for a whole network"
        raise StoreError(
            f"{store.path} is damaged: {text}. Delete that row, or measure with a timer that counts", path=str(store.path)
        )
    if original.median_ns < 1:
        raise InputError(f"the timer {type(timer).__name__} says that the whole network takes 0 ns; it must take some")
    nothing = Measurement(0, 0, 0, target, original.versions)
    inside = _inside(findings, whole, whole_key, timer, target, store)
    known = {key: measurements.get(key, nothing) for key in work} | dict(inside.values())
    ends = {end: key for end, (key, _) in inside.items()}
    return LatencyTable(known, candidates, units, original, ends, _replaced(findings.region, proposals) if ends else {})


def _inside(
    findings: Findings, whole: Timed, whole_key: str, timer: Timer, target: Target, store: Store | None
) -> dict[str, tuple[str, Measurement]]:
    """For every unit its key and the time of its nodes inside of the running network, where that can be had: eager, on a CPU."""
    if not isinstance(timer, InterleavedTimer) or target.backend != "eager" or torch.device(target.device).type != "cpu":
        return {}
    assert isinstance(whole.module, GraphModule)
    there = {node.name for node in whole.module.graph.nodes}
    nodes = {unit.end: [name for name in unit.nodes if name in there] for unit in findings.region.walk()}
    named = digest(whole_key)  # which holds the text of the whole network
    keys = {end: f"inside {named}: {' '.join(names)}" for end, names in nodes.items() if names}
    place = place_of(target, found := versions(target), timer.settings)
    with alone_on(target.device):  # another process may be measuring just these
        held = store.latencies(place, target, list(keys.values())) if store is not None else {}
        if all(key in held for key in keys.values()):
            return {end: (key, held[key]) for end, key in keys.items()}
        taken = nanoseconds_inside(whole.module, whole.inputs, target, rounds=timer.rounds, warmup=timer.warmup, clock=timer.clock)
        for end, key in keys.items():
            samples = [sum(taken[name][number] for name in nodes[end] if name in taken) for number in range(timer.rounds)]
            held.setdefault(key, summary(samples, target, found))
            if store is not None:
                store.add_latency(place, key, held[key])
    return {end: (key, held[key]) for end, key in keys.items()}


def _replaced(region: Unit, proposals: Sequence[Proposal]) -> dict[str, tuple[str, ...]]:
    """The units, those within units too, that each candidate stands for, by their ends."""
    chains: dict[str, list[tuple[Chain, dict[str, int]]]] = {}
    for unit in region.walk():
        for chain in unit.children:
            place = {cut: number for number, cut in enumerate(chain.cuts)}
            for cut in chain.cuts:
                chains.setdefault(cut, []).append((chain, place))
    found: dict[str, tuple[str, ...]] = {}
    for proposal in proposals:
        entry, end = proposal.segment.entry, proposal.segment.end
        for chain, place in chains.get(entry, ()):
            if place[entry] < place.get(end, 0):
                units = chain.units[place[entry] : place[end]]
                ends = tuple(below.end for unit in units for below in unit.walk())
                found.update({candidate.id: ends for candidate in proposal.candidates})
    return found


def _timed(
    parts: Mapping[str, Timed], timer: Timer, target: Target, store: Store | None, progress: Callable[[int, int], None] | None
) -> dict[str, Measurement]:
    """A measurement for each part, by its key; those that the store holds are taken from it."""
    if store is None:
        return dict(zip(parts, _asked(timer, list(parts.values()), target, progress), strict=True))
    settings = getattr(timer, "settings", None)
    if not isinstance(settings, str):
        raise InputError(f"{type(timer).__name__} has no text `settings` to keep its measurements under: give it one, or no store")
    place = place_of(target, versions(target), settings)
    with alone_on(target.device):  # another process may be measuring just these
        return _missing_timed(parts, timer, target, store, place, progress)


def _missing_timed(
    parts: Mapping[str, Timed],
    timer: Timer,
    target: Target,
    store: Store,
    place: str,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Measurement]:
    """What the store holds, and what is measured now and written to it."""
    found = store.latencies(place, target, list(parts))
    missing = [key for key in parts if key not in found]
    # All are timed in turn, their samples written round by round; a timer that keeps no log gets a few at a time.
    logs = isinstance(timer, InterleavedTimer)
    size = len(missing) if logs else _AT_A_TIME
    for start in range(0, len(missing), max(1, size)):
        some = missing[start : start + size]
        logging = replace(timer, log=_Log(store, place, some)) if isinstance(timer, InterleavedTimer) else timer
        shifted = _shifted(progress, start, len(missing), logs)
        measured = _asked(logging, [parts[key] for key in some], target, shifted)
        for key, measurement in zip(some, measured, strict=True):
            store.add_latency(place, key, measurement)
    return store.latencies(place, target, list(parts))


_AT_A_TIME = 16


def _asked(
    timer: Timer, modules: Sequence[Timed], target: Target, progress: Callable[[int, int], None] | None
) -> Sequence[Measurement]:
    """What a timer, which may be the user's, says of some modules."""
    measured = timer(modules, target=target, progress=progress)
    if (
        not isinstance(measured, Sequence)
        or len(measured) != len(modules)
        or not all(isinstance(m, Measurement) and isinstance(m.median_ns, int) and m.median_ns >= 0 for m in measured)
    ):
        what = f"a measurement of 0 ns or more for each of {len(modules)} modules"
        raise InputError(f"the timer {type(timer).__name__} must give {what}, found {measured!r:.200}")
    return measured


def _shifted(progress: Callable[[int, int], None] | None, done: int, total: int, whole: bool) -> Callable[[int, int], None] | None:
    """The progress of some as that of all."""
    if progress is None or whole:
        return progress
    return lambda part, of: progress(done + part * min(_AT_A_TIME, total - done) // max(1, of), total)


@dataclass(frozen=True)
class _Log:
    """The samples of some works in a store."""

    store: Store
    place: str
    works: Sequence[str]

    def earlier(self, index: int) -> Sequence[int]:
        return self.store.samples(self.place, self.works[index])

    def add(self, samples: Mapping[int, tuple[int, int]]) -> None:
        self.store.add_samples(self.place, {self.works[index]: sample for index, sample in samples.items()})


def _whole_key(whole: Timed) -> str:
    assert isinstance(whole.module, GraphModule)
    sizes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in pytree.tree_leaves(whole.inputs)]
    return f"whole: {signature(whole.module, ())} {sizes}"


def _parts(findings: Findings) -> GraphModule:
    """The baseline with every tensor in it that enters a segment."""
    entries = frozenset(segment.entry for segment in findings.segments)
    return Sequential((FoldBatchNorm(findings.operators, entries), ReuseMemory(findings.operators))).apply(findings.graph)


def _enter(work: dict[str, Timed | None], part: GraphModule, shapes: tuple[tuple[int, ...], ...]) -> str:
    key = signature(part, shapes)
    if key not in work:
        empty = all(node.op in ("placeholder", "output") for node in part.graph.nodes)
        work[key] = None if empty else Timed(part, shapes)
    return key


def _candidate_module(
    graph: GraphModule, candidate: Candidate, sides: Sequence[str], operators: Operators
) -> tuple[GraphModule, tuple[tuple[int, ...], ...]]:
    """What stands in the network when the candidate is taken: the convolution, its side inputs, what is kept behind."""
    entry, exit_node = node_named(graph, candidate.entry), node_named(graph, candidate.exit)
    assert entry is not None
    assert exit_node is not None
    part, shapes = Graph(), [shape_after(entry)]
    last = _placeholder(part, "x", entry)
    modules: dict[str, nn.Module] = {}
    before, after = facts(entry), facts(exit_node)
    turned = before.channels_last != after.channels_last
    if candidate.kind != "identity":
        added = [named for name in sides if (named := node_named(graph, name)) is not None]
        linear = not added and is_linear(candidate.geometry, before, after)
        modules["convolution"] = convolution(candidate.geometry, bias=candidate.geometry.bias, linear=linear, device="cpu")
        terms = []
        for number, side in enumerate(added):
            shapes.append(shape_after(side))
            modules[f"side_{number}"] = _matrix(shapes[-1], candidate.geometry.out_channels)
            terms.append((_placeholder(part, f"s{number}", side), f"side_{number}"))
        geometry, layout = candidate.geometry, after.channels_last
        behind = ""
        if candidate.moved:
            behind = "moved"
            norm = node_named(graph, candidate.moved)
            assert norm is not None
            modules[behind] = norm_behind(graph, norm, operators, candidate.geometry.out_channels)
        last = write_map(last, "convolution", geometry, linear=linear, channels_last=layout, sides=terms, norm=behind)[-1]
    elif turned:
        last = part.call_function(torch.permute, turn(last))
    for node in _kept_behind(graph, candidate):
        if candidate.kind == "identity" and not turned and node.target is entry.target and node.target in IDEMPOTENT:
            continue
        operand = last
        last = part.node_copy(node, lambda _, operand=operand: operand)  # type: ignore[misc]
        module = module_of(graph, node)
        if module is not None:
            last.target = f"kept.{len(modules)}"
            modules[last.target] = module
    part.output(last)
    return GraphModule(modules, part), tuple(shapes)


def _placeholder(part: Graph, name: str, node: Node) -> Node:
    """An input like the tensor that a node computes."""
    made = part.placeholder(name)
    record(made, shape=facts(node).shape, dtype=facts(node).dtype, channels_last=facts(node).channels_last)
    return made


def _matrix(shape: tuple[int, ...], out_channels: int) -> nn.Module:
    """What a side input of this shape is multiplied by."""
    geometry = Geometry(shape[1], out_channels, (Axis(),) * (len(shape) - 2))
    return convolution(geometry, bias=False, device="cpu")


def _kept_behind(graph: GraphModule, candidate: Candidate) -> list[Node]:
    """What runs between the one convolution and the cut: of the original, or an activation that is put there."""
    added = node_named(graph, candidate.added) if candidate.added else None
    kept: list[Node] = [] if added is None else [added]
    node = node_named(graph, candidate.end)
    while node is not None and node.name != candidate.exit:
        kept.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    return kept


def _units(graph: GraphModule, region: Unit) -> Iterator[tuple[Unit, list[Node]]]:
    """All units that compute something, with their own nodes in the folded graph."""
    named: Mapping[str, Node] = {node.name: node for node in graph.graph.nodes}
    for unit in region.walk():
        nodes = [named[name] for name in unit.nodes if name in named and named[name].op.startswith("call_")]
        if nodes:
            yield unit, nodes


def _runs_alone(part: GraphModule, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a unit that no candidate touches can be run on noise; one that wants indices or numbers stays in the remainder."""
    try:
        with torch.no_grad():
            part(*map(torch.zeros, shapes))
    except Exception:  # other people's layers
        return False
    return True


def worthwhile(proposals: Sequence[Proposal], table: LatencyTable, region: Unit) -> tuple[Proposal, ...]:
    """The candidates that are faster than leaving their stretch alone; no other can be in a best plan.

    Raises:
        InputError: the table is not of these candidates, or they are not of this region.
    """
    alone: dict[tuple[str, str], int] = {}
    for unit in region.walk():
        for chain in unit.children:
            costs = [sum(table.unit_ns(u.end) for u in below.walk()) for below in chain.units]
            for start in range(len(costs)):
                for stop in range(start + 1, len(costs) + 1):
                    alone[chain.cuts[start], chain.cuts[stop]] = sum(costs[start:stop])
    kept = []
    for proposal in proposals:
        limit = alone.get((proposal.segment.entry, proposal.segment.end))
        missing = [c.id for c in proposal.candidates if c.id not in table.candidates]
        if limit is None or missing:
            what = f"the table has no latency of {missing[0]}" if missing else f"the region has no stretch {proposal.segment}"
            raise InputError(f"{what}: proposals, table and region must come from one find_segments() and its measure_latency()")
        faster = tuple(c for c in proposal.candidates if table.candidate_ns(c.id) < limit)
        if faster:
            kept.append(Proposal(proposal.segment, faster))
    return tuple(kept)
