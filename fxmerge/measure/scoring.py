"""The importance table: which scorer, run where, kept where, and how thoroughly.

A scorer says which candidates are scored together (one task) and does one such task; an executor runs the tasks; a store keeps
every score the moment its task is done, and gives those that it holds. With a latency table at hand, all candidates are first
scored on few images, and only those that some good plan could want on all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from fxmerge.analysis.segments import Findings
from fxmerge.core.segment import Proposal
from fxmerge.core.table import Importance, ImportanceTable, LatencyTable
from fxmerge.measure.calibration import Batch, as_batches
from fxmerge.measure.digests import data_digest, network_digest
from fxmerge.measure.executors import Executor, Local
from fxmerge.measure.reconstruction import Reconstruction
from fxmerge.measure.screening import wanted
from fxmerge.measure.store import Store, Subject, key_of

log = logging.getLogger(__name__)

#: Candidate id -> importance.
Scores: TypeAlias = Mapping[str, Importance]
#: What does one task of a scorer.
Scoring: TypeAlias = Callable[[Sequence[Proposal]], Scores]


class Scorer(Protocol):
    """What measures importance. It and what it holds are sent to other processes by pickle."""

    @property
    def settings(self) -> str:
        """Its name and whatever else decides its scores, as a text; equal texts, equal scores."""

    def tasks(self, findings: Findings, proposals: Sequence[Proposal], at_least: int) -> Sequence[Sequence[Proposal]]:
        """The candidates to score, by those that are scored together; if possible no fewer tasks than asked for."""

    def prepare(self, findings: Findings, batches: Sequence[Batch]) -> Scoring:
        """What scores the candidates of one task, with all that serves every task made beforehand."""


@runtime_checkable
class Coarse(Protocol):
    """A scorer that can also do with less."""

    def coarse(self) -> Scorer | None:
        """Itself on fewer images, to tell which candidates matter; None where that would not be less."""


def measure_importance(
    findings: Findings,
    proposals: Sequence[Proposal],
    calibration: Any,
    *,
    scorer: Scorer | None = None,
    latency: LatencyTable | None = None,
    store: Store | None = None,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportanceTable:
    """The importance of every candidate.

    Args:
        findings: segments of a traced graph.
        proposals: what to score.
        calibration: a few hundred inputs: a tensor, or an iterable of inputs or (input, label) pairs.
        scorer: what scores; None for :class:`fxmerge.Reconstruction`.
        latency: with it, candidates that no good plan wants (:func:`fxmerge.measure.screening.wanted`) are scored on few images
            only; the table says of each on how many.
        store: where scores are written as they come; what it holds is not scored again.
        executor: where the work runs; None for here.
        progress: called with (done, total) candidates.

    Returns:
        The table. A candidate whose equations do not fit into the scorer's memory is missing, with a warning.

    Raises:
        CalibrationError: the calibration data cannot be used.
        StoreError, WorkerError: what was scored is lost only where there is no store.
    """
    batches = as_batches(calibration, findings.graph)
    return score(
        findings,
        proposals,
        batches,
        scorer=scorer or Reconstruction(),
        latency=latency,
        store=store,
        executor=executor,
        progress=progress,
    )


def score(
    findings: Findings,
    proposals: Sequence[Proposal],
    batches: Sequence[Batch],
    *,
    scorer: Scorer,
    latency: LatencyTable | None = None,
    store: Store | None = None,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportanceTable:
    """:func:`measure_importance` on batches that are ready."""
    work = _Work(findings, batches, store, executor or Local(), progress or (lambda done, total: None))
    coarse = scorer.coarse() if latency is not None and isinstance(scorer, Coarse) else None
    if coarse is None or latency is None:
        return ImportanceTable(work.scores(scorer, proposals, 0, _count(proposals)))
    # The bar shows the first round as the first half: how many there will be in the second is not known before.
    first = work.scores(coarse, proposals, 0, 2 * _count(proposals))
    kept = wanted(findings.region, proposals, latency, ImportanceTable(first), findings.fingerprint)
    chosen = [Proposal(p.segment, some) for p in proposals if (some := tuple(c for c in p.candidates if c.id in kept))]
    log.info("%d of %d candidates are scored on all images", _count(chosen), _count(proposals))
    second = work.scores(scorer, chosen, _count(proposals), _count(proposals) + _count(chosen))
    return ImportanceTable({**first, **second})


def _count(proposals: Iterable[Proposal]) -> int:
    return sum(len(proposal.candidates) for proposal in proposals)


@dataclass(frozen=True)
class _Task:
    """Candidates scored together; the segments come with them."""

    proposals: tuple[Proposal, ...]


@dataclass(frozen=True)
class _Job:
    """A scorer at one network and one calibration set; what workers are sent."""

    scorer: Scorer
    findings: Findings
    batches: Sequence[Batch]

    def prepare(self) -> Callable[[_Task], Scores]:
        scoring = self.scorer.prepare(self.findings, self.batches)
        return lambda task: scoring(task.proposals)


@dataclass(frozen=True)
class _Work:
    findings: Findings
    batches: Sequence[Batch]
    store: Store | None
    executor: Executor
    progress: Callable[[int, int], None]

    def scores(self, scorer: Scorer, proposals: Sequence[Proposal], before: int, total: int) -> dict[str, Importance]:
        """What the store holds, and what is scored now, in the order of the candidates."""
        held, subject = self._held(scorer, proposals)
        left = [Proposal(p.segment, some) for p in proposals if (some := tuple(c for c in p.candidates if c.id not in held))]
        exact = {c.id: Importance(0.0, 0, "exact") for p in left for c in p.candidates if c.exact}
        left = [Proposal(p.segment, some) for p in left if (some := tuple(c for c in p.candidates if not c.exact))]
        found = {**held, **exact}
        tasks = [_Task(tuple(task)) for task in scorer.tasks(self.findings, left, 4 * self.executor.workers)] if left else []
        done = before + len(found)
        self.progress(done, total)
        for number, scores in self.executor.run(_Job(scorer, self.findings, self.batches), tasks) if tasks else ():
            if self.store is not None and subject is not None:
                keys = {c.id: key_of(c) for p in tasks[number].proposals for c in p.candidates}
                self.store.add_importances(subject, {keys[name]: importance for name, importance in scores.items()})
            found.update(scores)
            done += _count(tasks[number].proposals)
            self.progress(done, total)
        if self.store is not None:  # another process may have been first
            found.update(self._held(scorer, proposals)[0])
        return {c.id: found[c.id] for p in proposals for c in p.candidates if c.id in found}

    def _held(self, scorer: Scorer, proposals: Sequence[Proposal]) -> tuple[dict[str, Importance], Subject | None]:
        if self.store is None:
            return {}, None
        subject = Subject(network_digest(self.findings.graph), data_digest(self.batches), scorer.settings)
        held = self.store.importances(subject)
        keys = {c.id: key_of(c) for p in proposals for c in p.candidates}
        return {name: held[key] for name, key in keys.items() if key in held}, subject
