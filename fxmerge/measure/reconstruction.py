"""Weights and importance without training: least squares for the weights, divergence of the output for the importance.

For a candidate with entry x the target y is what the original computes at its exit, before the activation that is kept. Its
importance is how far the network's output moves when that candidate alone is taken. Two passes over the data serve all candidates
of a group of entries, one for their normal equations and one for their scores; groups are as large as the memory limit allows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxmerge.algebra.affine import Affine, evaluate, evaluate_sides, pointwise
from fxmerge.algebra.least_squares import NormalEquations, covering, unknowns
from fxmerge.algebra.module import convolved
from fxmerge.algebra.through import Rows
from fxmerge.analysis.segments import Findings
from fxmerge.core.expression import Expression
from fxmerge.core.geometry import Geometry
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate, Proposal, Segment, narrowed
from fxmerge.core.table import Importance
from fxmerge.errors import CalibrationError, InputError, PlanMismatchError
from fxmerge.graph.layout import to_first, to_last
from fxmerge.graph.meta import facts
from fxmerge.graph.query import data_operands, node_named
from fxmerge.measure.calibration import Batch, as_batches, images_in, in_parts
from fxmerge.measure.digests import function_name
from fxmerge.measure.divergence import divergence
from fxmerge.measure.refit import Pair, Walk, with_weights
from fxmerge.measure.replay import Replacement, Replay
from fxmerge.measure.shelf import Shelf
from fxmerge.measure.standins import ChannelSums
from fxmerge.operators import Activation, Site, norm_behind, read_maps
from fxmerge.passes.fold_batchnorm import FoldBatchNorm

Divergence: TypeAlias = Callable[[Any, Any], Tensor]
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The closed-form scorer, and its fit.

    Args:
        ridge: of the least squares, relative to the mean of the Gram matrix's diagonal.
        rows_per_unknown: positions sampled for every unknown of a filter; more than there are means all.
        least_rows: at least so many positions.
        divergence: of a batch's outputs, one value for each image; None for :func:`fxmerge.measure.divergence.divergence`.
        shares: of a batch, how much each image counts in fits and in scores, (images,), from 0 on; None for all alike.
        score_images: how many of the calibration images, from the first, the divergence is measured on; all serve the weights.
        coarse_images: of these, how many tell which candidates are worth measuring on all, where latencies are known.
        hopeless: a candidate whose loss is above this after a batch is scored on what it has seen; no plan will want it.
        memory_bytes: bound on what the normal equations of one task take together; the tensors of one batch take a
            quarter of it at most.
        through: rounds in which the weights of a merge are fitted through the activation behind it; 0 for none.
        stay: fit the layers that stay, too, to what the student feeds them.
        seed: of the sampling of positions.
    """

    ridge: float = 1e-4
    rows_per_unknown: int = 16
    least_rows: int = 16384
    divergence: Divergence | None = None
    shares: Callable[[Batch], Tensor] | None = None
    score_images: int = 256
    coarse_images: int = 16
    hopeless: float = 1.0
    memory_bytes: int = 4 << 30
    through: int = 10
    stay: bool = True
    seed: int = 0

    @property
    def settings(self) -> str:
        """All options that decide a score."""
        name = function_name(self.divergence or divergence)
        others = ("divergence", "shares", "coarse_images", "through", "stay")
        numbers = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name not in others]
        numbers += [] if self.shares is None else [f"shares={function_name(self.shares)}"]
        return f"reconstruction divergence={name} {' '.join(numbers)}"

    def alone(self) -> Reconstruction:
        """This fit for a candidate that is scored alone: nothing but its own weights, by plain least squares."""
        return replace(self, through=0, stay=False)

    def coarse(self) -> Reconstruction | None:
        """This scorer with the divergence measured on ``coarse_images`` only."""
        return replace(self, score_images=self.coarse_images) if self.coarse_images < self.score_images else None

    def tasks(self, findings: Findings, proposals: Sequence[Proposal], at_least: int) -> Sequence[Sequence[Proposal]]:
        """Neighbouring stretches, as many as the memory limit and the number of tasks wanted allow.

        Warns:
            UserWarning: candidates whose equations alone are over the memory limit; they are left out.
        """
        fitting = narrowed(proposals, lambda candidate: _held_bytes(candidate) <= self.memory_bytes)
        left_out = sum(len(p.candidates) for p in proposals) - sum(len(p.candidates) for p in fitting)
        if left_out:
            most = max(_held_bytes(c) for p in proposals for c in p.candidates)
            warnings.warn(
                f"{left_out} candidates have normal equations of more than memory_bytes={self.memory_bytes:,} and are not scored; "
                f"the largest needs {most:,}",
                stacklevel=2,
            )
        return _grouped(fitting, self.memory_bytes, at_least)

    def work(self, findings: Findings, batches: Sequence[Batch]) -> _Work:
        """What fits and replaces candidates, for scorers that judge the outputs in another way."""
        return _Work(self, findings, batches)

    def prepare(self, findings: Findings, batches: Sequence[Batch]) -> Callable[[Sequence[Proposal]], dict[str, Importance]]:
        """What scores the candidates of one task: one pass over the data for their weights, one for their scores.

        Raises (when called):
            CalibrationError: the network rejects the calibration inputs, or gives NaN or infinity on them.
            InputError: its outputs say nothing of single images.

        Warns (when called):
            UserWarning: there is less data than there are weights to fit; the losses come out too low.
        """
        work = _Work(self, findings, batches)

        def scoring(proposals: Sequence[Proposal]) -> dict[str, Importance]:
            scores = work.scores(proposals, work.weights(proposals))
            work.warn_if_starved()
            return scores

        return scoring

    def fit(
        self, findings: Findings, plan: Plan, batches: Sequence[Batch], *, progress: Progress | None = None
    ) -> dict[str, Affine]:
        """Weights for the fitted merges of a plan, and for what stands for norms, one after the other from the input on.

        Every merge is fitted to the student's own inputs, as the merges before it make them, and to the original's targets, so
        that errors do not add up; so is, with ``stay``, every layer behind the first merge (:mod:`fxmerge.measure.refit`).

        Returns:
            By candidate id, the map in float64; by :meth:`Candidate.part`, what its side inputs go through, what stands for a norm;
            by the name of its node, what a layer that stays computes, its batch norm folded.

        Raises:
            PlanMismatchError: the plan was made for another graph, or with other limits.
        """
        work = _Work(self, findings, batches)
        with Shelf(self.memory_bytes) as shelf:
            return Walk(work, plan, work.segments_of(plan), self.stay, self.seed, progress).run(shelf)

    def fit_and_score(self, findings: Findings, plan: Plan, batches: Sequence[Batch]) -> tuple[dict[str, Affine], float]:
        """:meth:`fit`, and how far the output of the whole merged network then is from the original's."""
        work = _Work(self, findings, batches)
        weights = self.fit(findings, plan, batches)
        return weights, work.loss_of(plan, weights)


#: Candidates that share normal equations: one entry, one stride, one factor of upsampling, one output size, one number of groups,
#: the same side inputs.
_Key: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int, tuple[str, ...]]


@dataclass
class _Work:
    """One run of the scorer over one network and one calibration set."""

    options: Reconstruction
    findings: Findings
    batches: Sequence[Batch]
    folded: GraphModule = field(init=False)
    replay: Replay = field(init=False)
    starved: list[tuple[float, Candidate]] = field(init=False, default_factory=list)
    worst_starved: float = field(init=False, default=1.0)
    fixed: dict[str, Affine] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        entries = frozenset(segment.entry for segment in self.findings.segments)
        self.folded = FoldBatchNorm(self.findings.operators, entries).apply(self.findings.graph)
        self.replay = Replay(self.folded)
        if self.batches:
            self.batches = in_parts(self.batches, self.folded, self.images_at_once())
        empty = torch.empty(0)
        self.like: Tensor = next((p for p in self.folded.parameters() if p.is_floating_point()), empty)

    def images_at_once(self) -> int:
        """So many that all tensors of a batch fit into the memory limit."""
        known = [facts(node) for node in self.folded.graph.nodes if facts(node).shape]
        batch = max((known_of.shape[0] for known_of in known if known_of.shape and len(known_of.shape) > 2), default=1)
        one = sum(math.prod(k.shape or ()) * (k.dtype.itemsize if k.dtype else 4) for k in known) // max(1, batch)
        return max(1, self.options.memory_bytes // max(1, 4 * one))

    def original(self, batch: Batch, *, last: str | None = None) -> dict[Node, Any]:
        """The values of the original network, up to a node or all."""
        try:
            return self.replay.values(batch, last=last)
        except Exception as fault:
            sizes = ", ".join(str(tuple(value.shape)) for value in batch if isinstance(value, Tensor))
            text = (str(fault).splitlines() or [type(fault).__name__])[0]
            raise CalibrationError(
                f"the network rejects calibration inputs of size {sizes}: {text}. Give images of the size it was traced with"
            ) from fault

    def divergence(self, reference: Any, changed: Any, batch: Batch) -> float:
        """Summed over the images of a batch, each for what it counts."""
        measure = self.options.divergence or partial(divergence, images=images_in(batch))
        found, shares = measure(reference, changed), self.shares(batch)
        return float(found.sum() if shares is None else (found * shares.to(found)).sum())

    def shares(self, batch: Batch) -> Tensor | None:
        """How much each image of a batch counts; None where all count alike."""
        if self.options.shares is None:
            return None
        shares = self.options.shares(batch)
        if shares.shape != (images_in(batch),) or not bool((shares >= 0).all() & shares.isfinite().all()):
            raise InputError(f"shares must give a number from 0 on for each of {images_in(batch)} images, gave {shares!r:.200}")
        return shares

    def weight_of(self, batch: Batch) -> float:
        """What the images of a batch count together."""
        shares = self.shares(batch)
        return images_in(batch) if shares is None else float(shares.sum())

    def segments_of(self, plan: Plan) -> dict[str, Segment]:
        """The segment that each merge of a plan is made of, by the merge's id."""
        if plan.fingerprint != self.findings.fingerprint:
            raise PlanMismatchError("this plan was made for another graph than these findings: search the graph it was made for")
        found = {(s.entry, s.exit, s.end): s for s in self.findings.segments}
        missing = next((merge for merge in plan.merges if (merge.entry, merge.exit, merge.end) not in found), None)
        if missing is not None:
            raise PlanMismatchError(
                f"these findings hold no segment {missing.entry} -> {missing.end} for the merge {missing.id}: give find_segments "
                "the max_units and max_extent that the plan was made with",
                node=missing.exit,
            )
        return {merge.id: found[merge.entry, merge.exit, merge.end] for merge in plan.merges}

    def weights(self, proposals: Sequence[Proposal]) -> dict[str, Affine]:
        """Weights for every candidate that has any, and for the parts of it."""
        self.fix_norms([name for p in proposals for c in p.candidates for name in c.fixed])
        fitted = [c for p in proposals for c in p.candidates if c.kind == "fitted"]
        equations = self._equations(fitted, self._twice())
        self.starved += [(unknowns(c.geometry) / max(1, equations[_key(c)].rows), c) for c in fitted]
        maps = {name: part for c in fitted for name, part in self._solved(equations[_key(c)], c).items()}
        maps.update(self._moved([c for c in fitted if c.moved], maps, self._twice()))
        for proposal in proposals:
            maps.update({c.id: self.composed(proposal.segment, c) for c in proposal.candidates if c.kind == "composed"})
        return maps

    def warn_if_starved(self) -> None:
        """Warn where a filter has more weights than the data has positions: it can fit them by heart."""
        ratio, worst = max(self.starved, key=lambda entry: entry[0], default=(0.0, None))
        self.starved.clear()
        if worst is not None and ratio > self.worst_starved:
            self.worst_starved = ratio
            images = sum(map(images_in, self.batches))
            warnings.warn(
                f"{images} calibration images are too few: {worst.id} has {ratio:.1f} times as many weights a filter as they have "
                f"positions, so losses come out too low. Give at least {math.ceil(images * ratio)}, better ten times that",
                stacklevel=3,
            )

    def _twice(self) -> Iterator[Pair]:
        """The values of the original, batch by batch, as those of a student too that does not differ yet."""
        for batch in self.batches:
            with torch.inference_mode():
                values = self.original(batch)
            yield Pair(values, values, self.shares(batch))

    def _equations(self, fitted: Sequence[Candidate], pairs: Iterable[Pair]) -> dict[_Key, NormalEquations]:
        """Normal equations for these candidates, from the student's values to the original's."""
        shared: dict[_Key, list[Candidate]] = {}
        for candidate in fitted:
            shared.setdefault(_key(candidate), []).append(candidate)
        equations = {
            key: NormalEquations.empty(
                covering([c.geometry for c in members]), self.like.device, extra=self._numbers_of_sides(members[0])
            )
            for key, members in shared.items()
        }
        generator = torch.Generator().manual_seed(self.options.seed)
        for original, student, shares in pairs if fitted else ():
            with torch.inference_mode():
                for key, members in shared.items():
                    x = self.image(key[0], student)
                    targets = {c.exit: self.image(c.exit, original) for c in members}
                    for name, value in ((key[0], x), *targets.items()):
                        _require_finite(name, value)
                    positions = self.positions(equations[key].geometry, x, next(iter(targets.values())), generator)
                    sides = self._sides(members[0], original, len(x))
                    equations[key].add(x, targets, positions, sides=sides, shares=shares)
        return equations

    def image(self, name: str, values: Mapping[Node, Any]) -> Tensor:
        """The value of a node with channels first, whatever its layout."""
        return _turned_if(self._is_last(name), values[self.replay.named[name]], to_first)

    def _is_last(self, name: str) -> bool:
        return facts(self.replay.named[name]).channels_last

    def positions(self, geometry: Geometry, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor | None:
        there = x.shape[0] * math.prod(y.shape[2:])
        wanted = max(self.options.least_rows, self.options.rows_per_unknown * unknowns(geometry))
        share = math.ceil(wanted * x.shape[0] / sum(map(images_in, self.batches)))
        if share >= there:
            return None
        return torch.randperm(there, generator=generator)[:share].to(x.device)

    def composed(self, segment: Segment, candidate: Candidate) -> Affine:
        """The map that the segment's remaining layers compose to; the identity, where none is left."""
        if candidate.kind == "identity":
            return Affine.identity(candidate.geometry.in_channels, len(candidate.geometry.axes))
        expression = segment.expression.without(candidate.removed)
        return evaluate(expression, self._maps(expression, candidate))

    def _maps(self, expression: Expression, candidate: Candidate) -> dict[str, Affine]:
        graph = self.findings.graph
        nodes = [node for step in expression.steps[1:] if (node := node_named(graph, step.name)) is not None]
        self.fix_norms(candidate.fixed)
        fixed = {name: self.fixed[name] for name in candidate.fixed}
        return {**read_maps(graph, nodes, self.findings.verdicts, self.findings.operators), **fixed}

    def fix_norms(self, names: Sequence[str]) -> None:
        """Find the scale and shift that stand for each of these norms, as the original runs on the data."""
        sums = {name: ChannelSums() for name in names if name not in self.fixed}
        for batch in self.batches if sums else ():
            with torch.inference_mode():
                values = self.original(batch)
                for name, total in sums.items():
                    operand = data_operands(self.replay.named[name])[0].name
                    total.add(self.image(operand, values), self.image(name, values), self.shares(batch))
        self.fixed.update({name: total.solve() for name, total in sums.items()})

    def _sides(self, candidate: Candidate, values: Mapping[Node, Any], images: int) -> Tensor | None:
        """The numbers of a fitted candidate's side inputs, (images, numbers), as the original has them."""
        found = [values[self.replay.named[name]].flatten(1).expand(images, -1) for name in candidate.sides]
        return torch.cat(found, 1) if found else None

    def _numbers_of_sides(self, candidate: Candidate) -> int:
        return sum(math.prod((facts(self.replay.named[name]).shape or ())[1:]) for name in candidate.sides)

    def _solved(self, equations: NormalEquations, candidate: Candidate) -> dict[str, Affine]:
        """The convolution of a fitted candidate, and the matrix of each of its side inputs."""
        affine, matrix = equations.solve_with_sides(candidate.exit, candidate.geometry, ridge=self.options.ridge)
        sizes = [math.prod((facts(self.replay.named[name]).shape or ())[1:]) for name in candidate.sides]
        parts = zip(candidate.sides, matrix.split(sizes, 1) if sizes else (), strict=True)
        dims = len(candidate.geometry.axes)
        return {candidate.id: affine, **{candidate.part(name): pointwise(part, dims) for name, part in parts}}

    def _moved(self, moved: Sequence[Candidate], maps: Mapping[str, Affine], pairs: Iterable[Pair]) -> dict[str, Affine]:
        """The scale and shift of the norm behind the convolution of each of these candidates, whose weights are known."""
        sums = {c.id: ChannelSums() for c in moved}
        for original, student, shares in pairs if moved else ():
            with torch.inference_mode():
                for candidate in moved:
                    names, compute = self._on_images(candidate, maps)
                    found = compute(self.image(candidate.entry, student), *(original[self.replay.named[n]] for n in names[1:]))
                    sums[candidate.id].add(found, self.image(candidate.exit, original), shares)
        return {c.part(c.moved): sums[c.id].solve() for c in moved}

    def replacement(self, segment: Segment, candidate: Candidate, maps: Mapping[str, Affine]) -> Replacement:
        """What the candidate computes from its entry and its side inputs, in the network's own dtype and layouts.

        Args:
            segment: that it is of.
            candidate: whose numbers ``maps`` holds if it is fitted; if it is composed, they are worked out.
            maps: as :meth:`weights` gives them.
        """
        names, compute = self._on_images(candidate, maps, segment)
        before, after = self._is_last(candidate.entry), self._is_last(candidate.exit)

        def replaced(x: Tensor, *sides: Tensor) -> Tensor:
            return _turned_if(after, compute(_turned_if(before, x, to_first), *sides), to_last)

        return names, replaced if before or after else compute

    def _on_images(self, candidate: Candidate, maps: Mapping[str, Affine], segment: Segment | None = None) -> Replacement:
        """The same, channels first; of a composed candidate, its segment must be known."""
        if candidate.kind == "identity":
            return (candidate.entry,), lambda x: x
        matrices = {name: maps[candidate.part(name)].weight.flatten(1) for name in candidate.sides}
        if segment is not None and candidate.kind == "composed":
            expression = segment.expression.without(candidate.removed)
            matrices = evaluate_sides(expression, self._maps(expression, candidate)) if expression.sides else {}
        affine = maps.get(candidate.id)
        if affine is None:
            assert segment is not None
            affine = self.composed(segment, candidate)
        convolve, norm = partial(convolved, affine), self._norm_behind(candidate, maps)

        def with_all(x: Tensor, *sides: Tensor) -> Tensor:
            terms = zip(matrices.values(), sides, strict=True)
            return norm(sum((torch.einsum("oi,ni...->no...", matrix.to(s), s) for matrix, s in terms), start=convolve(x)))

        return (candidate.entry, *matrices), with_all if matrices or candidate.moved else convolve

    def _norm_behind(self, candidate: Candidate, maps: Mapping[str, Affine]) -> Callable[[Tensor], Tensor]:
        """The norm that is moved behind the convolution, its scale and shift too, where they are known."""
        if not candidate.moved:
            return lambda x: x
        node = self.replay.named[candidate.moved]
        norm = norm_behind(self.folded, node, self.findings.operators, candidate.geometry.out_channels).to(self.like)
        scaling = maps.get(candidate.part(candidate.moved))
        return norm if scaling is None else lambda x: convolved(scaling, norm(x))

    def refit(self, merge: Candidate, pairs: Sequence[Pair]) -> dict[str, Affine]:
        """Weights for one merge, and for its parts, from the student's own values to the original's."""
        if merge.kind == "composed":
            self.fix_norms(merge.fixed)
            return {merge.part(name): self.fixed[name] for name in merge.fixed}
        if merge.kind == "identity":
            return {}
        equations = self._equations([merge], pairs)[_key(merge)]
        maps = self._solved(equations, merge)
        if self.options.through and not merge.sides and not merge.moved:
            maps[merge.id] = self._through(merge, equations, maps[merge.id], pairs)
        return {**maps, **(self._moved([merge], maps, pairs) if merge.moved else {})}

    def _through(self, merge: Candidate, equations: NormalEquations, affine: Affine, pairs: Sequence[Pair]) -> Affine:
        """The weights fitted through the activation that all readers of the exit apply, if they do."""
        exit_node = self.replay.named[merge.exit]
        readers = list(exit_node.users)
        verdicts = [self.findings.operators.verdict(Site(self.folded, node)) for node in readers]
        kinds = {verdict.name for verdict in verdicts if isinstance(verdict, Activation)}
        if len(kinds) != 1 or not all(isinstance(v, Activation) for v in verdicts) or readers[0].all_input_nodes != [exit_node]:
            return affine
        rows = Rows(merge.geometry, self.options.memory_bytes // 4)
        generator = torch.Generator().manual_seed(self.options.seed)
        with torch.inference_mode(False):
            for original, student, _ in pairs:
                x, y = self.image(merge.entry, student).clone(), self.image(merge.exit, original).clone()
                if not rows.add(x, y, self.positions(equations.geometry, x, y, generator)):
                    return affine

            def activation(value: Tensor) -> Tensor:
                result: Tensor = self.replay.run(readers[0], {exit_node: value})
                return result

            return rows.fitted(equations, affine, activation, ridge=self.options.ridge, rounds=self.options.through)

    def scores(self, proposals: Sequence[Proposal], maps: Mapping[str, Affine]) -> dict[str, Importance]:
        """How far the output moves for each candidate alone."""
        pending = {c.id: c for p in proposals for c in p.candidates if not c.exact}
        segments = {c.id: p.segment for p in proposals for c in p.candidates}
        scores = {c.id: Importance(0.0, 0, "exact") for p in proposals for c in p.candidates if c.exact}
        sums = dict.fromkeys(pending, 0.0)
        images, weight = 0, 0.0
        with torch.inference_mode():
            for batch in in_parts(self.batches, self.folded, self.images_at_once(), limit=self.options.score_images):
                env = self.original(batch)
                reference = env[self.replay.output]
                images += images_in(batch)
                weight += self.weight_of(batch)
                for name, candidate in list(pending.items()):
                    value = self.replay.computed(self.replacement(segments[name], candidate, maps), env)
                    changed = self.replay.output_with(env, candidate.exit, value)
                    sums[name] += self.divergence(reference, changed, batch)
                    if not sums[name] <= self.options.hopeless * weight:
                        scores[name] = Importance(_sane(sums[name], weight), images, "reconstruction")
                        del pending[name]
        for name in pending:
            scores[name] = Importance(_sane(sums[name], weight), images, "reconstruction")
        return scores

    def loss_of(self, plan: Plan, weights: Mapping[str, Affine]) -> float:
        """How far the output moves when all merges of a plan are made."""
        segments = self.segments_of(plan)
        taken = {}
        for merge in plan.merges:
            taken[merge.exit] = self.replacement(segments[merge.id], merge, weights)
        for name, affine in weights.items():
            node = self.replay.named.get(name)
            if node is not None:  # a layer that stays
                taken[name] = (node.all_input_nodes[0].name,), partial(with_weights, affine)
        total, weight = 0.0, 0.0
        with torch.inference_mode():
            for batch in self.batches:
                reference = self.original(batch)[self.replay.output]
                changed = self.replay.values(batch, replaced=taken)[self.replay.output]
                total += self.divergence(reference, changed, batch)
                weight += self.weight_of(batch)
        return _sane(total, weight)


def _key(candidate: Candidate) -> _Key:
    geometry = candidate.geometry
    excess = tuple(axis.excess for axis in geometry.axes)
    return candidate.entry, geometry.stride, geometry.up, excess, geometry.groups, candidate.sides


def _held_bytes(candidate: Candidate) -> int:
    """What the normal equations of a candidate take: the Gram matrix, its factor, and the weights that are solved for."""
    if candidate.kind != "fitted":
        return 0
    m = unknowns(candidate.geometry)
    return 3 * 8 * candidate.geometry.groups * m * m


def _grouped(proposals: Sequence[Proposal], memory_bytes: int, at_least: int) -> list[list[Proposal]]:
    """Proposals in their order, in groups within a memory limit and of about the same number of candidates."""
    most = math.ceil(sum(len(p.candidates) for p in proposals) / max(1, at_least))
    groups: list[list[Proposal]] = []
    held: dict[_Key, int] = {}
    for proposal in proposals:
        own = {_key(c): 0 for c in proposal.candidates if c.kind == "fitted"}
        for candidate in proposal.candidates:
            if candidate.kind == "fitted":
                own[_key(candidate)] = max(own[_key(candidate)], _held_bytes(candidate))
        both = {key: max(held.get(key, 0), own.get(key, 0)) for key in {**held, **own}}
        full = groups and sum(len(p.candidates) for p in groups[-1]) >= most
        apart = groups and groups[-1][-1].segment.entry != proposal.segment.entry
        if not groups or sum(both.values()) > memory_bytes or (full and apart):
            groups.append([])
            both = own
        groups[-1].append(proposal)
        held = both
    return groups


def _turned_if(turned: bool, value: Tensor, dims: Callable[[int], tuple[int, ...]]) -> Tensor:
    return value.permute(dims(value.dim())) if turned else value


def _require_finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise CalibrationError(f"the network gives NaN or infinity at {name} on the calibration inputs; check their preprocessing")


def _sane(total: float, weight: float) -> float:
    """The mean loss. A replacement that overflows is as bad as can be; a finite number keeps the solver's sums exact."""
    if not weight > 0:
        raise InputError("no image counts: shares gave 0 for all")
    loss = total / weight
    return loss if math.isfinite(loss) and loss < 1e6 else 1e6


def fit(
    findings: Findings,
    plan: Plan,
    calibration: Any,
    *,
    scorer: Reconstruction | None = None,
    progress: Progress | None = None,
) -> dict[str, Affine]:
    """Weights for a plan's fitted merges, from data, in closed form; for ``linearize(..., weights=...)``.

    Args:
        findings: segments of the graph that the plan was made for.
        plan: what to fit.
        calibration: a few hundred inputs: a tensor, or an iterable of inputs or (input, label) pairs.
        scorer: its options; None for the defaults.
        progress: called with (done, total) merges.

    Raises:
        CalibrationError: the calibration data cannot be used.
        PlanMismatchError: the plan was made for another graph, or with other limits.
    """
    batches = as_batches(calibration, findings.graph)
    return (scorer or Reconstruction()).fit(findings, plan, batches, progress=progress)
