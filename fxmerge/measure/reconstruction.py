"""Weights and importance without training: least squares for the weights, divergence of the output for the importance.

For a candidate with entry x the target y is what the original computes at its exit, before the activation that is kept. Its
importance is how far the network's output moves when that candidate alone is taken, on images that its weights were not fitted to:
a kernel with more weights a filter than there are positions fits those by heart. (MobileNetV2 on CIFAR-10, whose last maps are 4x4,
128 images: a fitted 7x7 over three blocks scored 5e-7 on the images that it was fitted to; a plan of such merges lost 0.12 on its
calibration images and 0.54 on others, 17 points of accuracy.) Two passes over the data serve all candidates of a group of entries,
one for their normal equations and one for their scores; groups are as large as the memory limit allows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxmerge.algebra.affine import Affine
from fxmerge.algebra.least_squares import unknowns
from fxmerge.analysis.segments import Findings
from fxmerge.core.options import require_number, require_whole
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Proposal, Segment, narrowed
from fxmerge.core.table import Importance, bounded
from fxmerge.errors import InputError, PlanMismatchError
from fxmerge.graph.meta import facts
from fxmerge.measure.calibration import Batch, as_batches, images_in, in_parts, last_images
from fxmerge.measure.digests import function_name
from fxmerge.measure.divergence import divergence
from fxmerge.measure.fitting import Fitting, grouped, held_bytes
from fxmerge.measure.progress import Progress
from fxmerge.measure.refit import Walk, with_weights
from fxmerge.measure.shelf import Shelf
from fxmerge.measure.substitution import counting
from fxmerge.operators import Map

Divergence: TypeAlias = Callable[[Any, Any], Tensor]

#: Of a rough fit: images, for the weights at least and for the loss at most, positions at least, and positions for every unknown.
_ROUGH_IMAGES, _ROUGH_ROWS, _ROUGH_RATIO = 256, 4096, 4


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The closed-form scorer, and its fit.

    Args:
        ridge: of the least squares, relative to the mean of the Gram matrix's diagonal.
        rows_per_unknown: positions sampled for every unknown of a filter; more than there are means all.
        least_rows: at least so many positions.
        divergence: of a batch's outputs, one value for each image; None for :func:`fxmerge.measure.divergence.divergence`.
        shares: of a batch, how much each image counts in fits and in scores, (images,), from 0 on; None for all alike, as they
            do, too, in fits of tensors whose first dimension is not that of the images.
        score_images: how many of the calibration images, in the order of :func:`as_batches`, the divergence is measured on, at
            most a quarter; while candidates or plans are compared, these serve no weights.
        fit_images: how many of the others the weights of candidates that are scored are fitted to; None for all. With a number,
            nothing warns that they are few.
        coarse_images: how many tell which candidates are worth measuring on all, where latencies are known; their weights are
            then fitted to eight times as many, on fewer positions.
        hopeless: a candidate whose loss is above this after a batch is scored on what it has seen; no plan will want it.
        memory_bytes: bound on what the normal equations of one task take together; the tensors of one batch take a
            quarter of it at most.
        through: rounds in which the weights of a merge are fitted through the activation behind it; 0 for none.
        stay: fit the layers that stay, too, to what the student feeds them; or the names of the nodes of those that are fitted
            (of a norm's, where one is behind the convolution), if no merge has taken them.
        seed: of the sampling of positions.
    """

    ridge: float = 1e-4
    rows_per_unknown: int = 8
    least_rows: int = 16384
    divergence: Divergence | None = None
    shares: Callable[[Batch], Tensor] | None = None
    score_images: int = 64
    fit_images: int | None = None
    coarse_images: int = 16
    hopeless: float = 1.0
    memory_bytes: int = 4 << 30
    through: int = 10
    stay: bool | Sequence[str] = True
    seed: int = 0

    def __post_init__(self) -> None:
        wholes = {"rows_per_unknown": 1, "least_rows": 1, "score_images": 1, "coarse_images": 1, "memory_bytes": 1, "through": 0}
        for name, least in wholes.items():
            require_whole(name, getattr(self, name), least)
        if self.fit_images is not None:
            require_whole("fit_images", self.fit_images, 1)
        if not isinstance(self.stay, bool):
            if not isinstance(self.stay, Sequence) or isinstance(self.stay, str) or not all(isinstance(n, str) for n in self.stay):
                raise InputError(f"stay must be True, False or the names of nodes, found {self.stay!r:.80}")
            object.__setattr__(self, "stay", tuple(self.stay))
        require_number("ridge", self.ridge, "a number from 0 on", lambda ridge: 0 <= ridge < math.inf)
        require_number("hopeless", self.hopeless, "a positive number", lambda loss: loss > 0)

    @property
    def settings(self) -> str:
        """All options that decide a score."""
        name = function_name(self.divergence or divergence)
        others = ("divergence", "shares", "coarse_images", "through", "stay")
        numbers = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name not in others]
        numbers += [] if self.shares is None else [f"shares={function_name(self.shares)}"]
        return f"reconstruction on images held out divergence={name} {' '.join(numbers)}"

    def alone(self) -> Reconstruction:
        """This fit for a candidate that is scored alone: nothing but its own weights, by plain least squares."""
        return replace(self, through=0, stay=False)

    def coarse(self) -> Reconstruction | None:
        """This scorer with the divergence measured on ``coarse_images`` only, and weights that cost less."""
        if self.coarse_images >= self.score_images:
            return None
        return replace(self.on_fewer_positions(), score_images=self.coarse_images, fit_images=8 * self.coarse_images)

    def on_fewer_positions(self) -> Reconstruction:
        """This fit where its weights need not be the best that the data has."""
        rows, ratio = min(self.least_rows, _ROUGH_ROWS), min(self.rows_per_unknown, _ROUGH_RATIO)
        return replace(self, least_rows=rows, rows_per_unknown=ratio)

    def tasks(self, findings: Findings, proposals: Sequence[Proposal], at_least: int) -> Sequence[Sequence[Proposal]]:
        """Neighbouring stretches, as many as the memory limit and the number of tasks wanted allow.

        Warns:
            UserWarning: candidates whose equations alone are over the memory limit; they are left out.
        """
        fitting = narrowed(proposals, lambda candidate: held_bytes(candidate) <= self.memory_bytes)
        left_out = sum(len(p.candidates) for p in proposals) - sum(len(p.candidates) for p in fitting)
        if left_out:
            most = max(held_bytes(c) for p in proposals for c in p.candidates)
            warnings.warn(
                f"{left_out} candidates have normal equations of more than memory_bytes={self.memory_bytes:,} and are not scored; "
                f"the largest needs {most:,}",
                stacklevel=2,
            )
        return grouped(fitting, self.memory_bytes, at_least)

    def work(self, findings: Findings, batches: Sequence[Batch]) -> _Work:
        """What fits and replaces candidates that are scored, for scorers that judge the outputs in another way, too."""
        batches = counting(self.shares, batches, findings.graph)
        if self.fit_images is not None and self.fit_images < sum(map(images_in, batches)):
            batches = in_parts(batches, findings.graph, max(map(images_in, batches)), limit=self.fit_images)
        return _Work(self, findings, batches)

    def prepare(self, findings: Findings, batches: Sequence[Batch]) -> Callable[[Sequence[Proposal]], dict[str, Importance]]:
        """What scores the candidates of one task: one pass over the data for their weights, one for their scores.

        Raises (when called):
            CalibrationError: the network rejects the calibration inputs, or gives NaN or infinity on them.
            InputError: its outputs say nothing of single images.

        Warns (when called):
            UserWarning: there is less data than there are weights to fit, which then fit it by heart.
        """
        judge, work = self._apart(findings, batches, self.score_images)

        def scoring(proposals: Sequence[Proposal]) -> dict[str, Importance]:
            scores = judge.scores(proposals, work.weights(proposals))
            work.warn_if_starved()
            return scores

        return scoring

    def fit(
        self, findings: Findings, plan: Plan, batches: Sequence[Batch], *, progress: Progress | None = None
    ) -> dict[str, Affine]:
        """Weights for the fitted merges of a plan, and for what stands for norms, one after the other from the input on.

        Every merge is fitted to the student's own inputs, as the merges before it make them, and to the original's targets, so
        that errors do not add up; so is, with ``stay``, every layer behind the first merge, or those named
        (:mod:`fxmerge.measure.refit`).

        Returns:
            By candidate id, the map in float64; by :meth:`Candidate.part`, what its side inputs go through, what stands for a norm;
            by the name of its node, what a layer that stays computes, its batch norm folded.

        Raises:
            InputError: ``stay`` names no layer of the network's.
            PlanMismatchError: the plan was made for another graph, or with other limits.
        """
        return _Work(self, findings, batches).fit(plan, progress)

    def held_out_loss(self, findings: Findings, plan: Plan, batches: Sequence[Batch]) -> float:
        """How far the output of the whole merged network is from the original's on some images, fitted to the others."""
        judge, work = self._apart(findings, batches, _ROUGH_IMAGES)
        return judge.loss_of(plan, work.fit(plan))

    def _apart(self, findings: Findings, batches: Sequence[Batch], most: int) -> tuple[_Work, _Work]:
        """What judges on so many of the images, or a quarter, and what fits to the others; of too few, both have all."""
        batches = counting(self.shares, batches, findings.graph)
        images = sum(map(images_in, batches))
        held = min(most, images // 4)
        work = self.work(findings, last_images(batches, findings.graph, images - held))
        judge = _Work(self, findings, in_parts(batches, findings.graph, held, limit=held) if held else batches)
        judge.fixed = work.fixed
        return judge, work

    def rough(self, findings: Findings, batches: Sequence[Batch]) -> Callable[[Plan], float]:
        """What fits a plan on fewer positions, of a part of the images if those have enough, and gives its loss on others.

        The fit never saw these. Where maps are small, it takes more images to have positions for all unknowns: over plans of
        MobileNetV2 on CIFAR-10, whose last maps are 2x2, the logarithms of the losses of rough fits to 256 images and of fits to
        768 went together by 0.74, those of rough fits to 768 by 0.99, in 1.6 times the time.
        """
        few = replace(self.on_fewer_positions(), fit_images=None)
        batches = counting(self.shares, batches, findings.graph)
        images = sum(map(images_in, batches))
        held = min(_ROUGH_IMAGES, images // 3)
        most = max(_ROUGH_IMAGES, images_for(findings, self.rows_per_unknown))
        learn = few.work(findings, in_parts(batches, findings.graph, _ROUGH_IMAGES, limit=min(most, images - held)))
        judge = few.work(findings, last_images(batches, findings.graph, held) if held else learn.batches)
        judge.fixed = learn.fixed
        return lambda plan: judge.loss_of(plan, learn.fit(plan))


@dataclass
class _Work(Fitting):
    """One run of the scorer over one network and one calibration set."""

    options: Reconstruction

    def fit(self, plan: Plan, progress: Progress | None = None) -> dict[str, Affine]:
        """Weights for a whole plan."""
        with Shelf(self.options.memory_bytes) as shelf:
            return Walk(self, plan, self.segments_of(plan), self.options.stay, self.options.seed, progress).run(shelf)

    def divergence(self, reference: Any, changed: Any, batch: Batch) -> float:
        """Summed over the images of a batch, each for what it counts."""
        measure = self.options.divergence or partial(divergence, images=images_in(batch))
        found, shares = measure(reference, changed), self.shares(batch)
        return float(found.sum() if shares is None else (found * shares.to(found)).sum())

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
                        scores[name] = Importance(mean_loss(sums[name], weight), images, "reconstruction")
                        del pending[name]
        for name in pending:
            scores[name] = Importance(mean_loss(sums[name], weight), images, "reconstruction")
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
        return mean_loss(total, weight)


def images_for(findings: Findings, rows_per_unknown: int) -> int:
    """So many images that every convolution of a network has this many positions for each unknown of a filter."""
    wanted = 0
    for node, verdict in findings.verdicts.items():
        shape = facts(node).shape
        if isinstance(verdict, Map) and verdict.role == "convolution" and shape is not None:
            places = math.prod(shape[1:]) // verdict.geometry.out_channels
            wanted = max(wanted, math.ceil(rows_per_unknown * unknowns(verdict.geometry) / max(1, places)))
    return wanted


def mean_loss(total: float, weight: float) -> float:
    """A sum of losses over what the images count together; InputError where none counts."""
    if not weight > 0:
        raise InputError("no image that is scored counts: shares gave 0 for them all; give more of them, or others")
    return bounded(total / weight)


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
        InputError: the scorer's ``stay`` names no layer of the network's.
        PlanMismatchError: the plan was made for another graph, or with other limits.
    """
    batches = as_batches(calibration, findings.graph)
    return (scorer or Reconstruction()).fit(findings, plan, batches, progress=progress)
