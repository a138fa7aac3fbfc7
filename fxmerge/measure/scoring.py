"""The importance table: which scorer, run where, kept where, and how thoroughly.

A scorer says which candidates are scored together (one task) and does one such task; an executor runs the tasks; a store keeps
every score the moment its task is done, and gives those that it holds. With a latency table at hand, all candidates are first
scored on few images, and only those that some good plan could want on all.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.analysis.segments import Findings
from fxmerge.core.segment import Proposal, narrowed
from fxmerge.core.table import Importance, ImportanceTable, LatencyTable
from fxmerge.errors import InputError
from fxmerge.measure.calibration import Batch, as_batches
from fxmerge.measure.digests import data_digest, network_digest
from fxmerge.measure.executors import Executor, ExecutorName, as_executor
from fxmerge.measure.reconstruction import Reconstruction
from fxmerge.measure.screening import DRAWS, wanted
from fxmerge.measure.store import Store, key_of
from fxmerge.measure.study import Subject
from fxmerge.solve.objective import Objective

log = logging.getLogger(__name__)

#: Candidate id -> importance.
Scores: TypeAlias = Mapping[str, Importance]
#: What does one task of a scorer.
Scoring: TypeAlias = Callable[[Sequence[Proposal]], Scores]


class Scorer(Protocol):
    """What measures importance. It and what it holds are sent to other processes by pickle."""

    @property
    def settings(self) -> str:
        """Its name and whatever else decides its scores, as a text; equal texts, equal scores.

        This text, the digests of network and data, and the candidate are all that a store keys scores by. The source of a class
        of yours is not: change what it computes, and the text must change, by a version number in it, say.
        """

    def tasks(self, findings: Findings, proposals: Sequence[Proposal], at_least: int) -> Sequence[Sequence[Proposal]]:
        """The candidates to score, by those that are scored together; if possible no fewer tasks than asked for."""

    def prepare(self, findings: Findings, batches: Sequence[Batch]) -> Scoring:
        """What scores the candidates of one task, with all that serves every task made beforehand."""


@runtime_checkable
class Coarse(Protocol):
    """A scorer that can also do with less."""

    def coarse(self) -> Scorer | None:
        """Itself on fewer images, to tell which candidates matter; None where that would not be less."""


def _check_protocol(scorer: object, executor: object) -> None:
    if not all(hasattr(scorer, name) for name in ("settings", "tasks", "prepare")):
        raise InputError(f"scorer must be a Scorer, such as fxmerge.Reconstruction(), found {scorer!r:.80}")
    if not all(hasattr(executor, name) for name in ("workers", "run")):
        raise InputError(f"executor must be an Executor, such as fxmerge.Processes(), found {executor!r:.80}")


def fitter_of(scorer: Scorer | None) -> Reconstruction:
    """What fits weights beside a scorer: itself, the one that it holds as ``fit``, or the default."""
    held = getattr(scorer, "fit", None)
    return next((s for s in (scorer, held) if isinstance(s, Reconstruction)), Reconstruction())


def measure_importance(
    findings: Findings,
    proposals: Sequence[Proposal],
    calibration: Any,
    *,
    scorer: Scorer | None = None,
    latency: LatencyTable | None = None,
    store: Store | None = None,
    executor: Executor | ExecutorName | None = None,
    objective: Objective = "additive-loss",
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
        objective: what plans will be ranked by; with ``latency``, it decides which candidates are wanted.
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
        objective=objective,
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
    executor: Executor | ExecutorName | None = None,
    objective: Objective = "additive-loss",
    progress: Callable[[int, int], None] | None = None,
) -> ImportanceTable:
    """:func:`measure_importance` on batches that are ready."""
    executor = as_executor(executor or "local")
    _check_protocol(scorer, executor)
    work = _Work(findings, batches, store, executor, progress or (lambda done, total: None))
    coarse = scorer.coarse() if latency is not None and isinstance(scorer, Coarse) else None
    if coarse is None or latency is None:
        return ImportanceTable(work.scores(scorer, proposals, 0, _count(proposals)))
    # The bar shows the first round as the first half: how many there will be in the others is not known before.
    known = work.scores(coarse, proposals, 0, 2 * _count(proposals))
    done = _count(proposals)
    fine: set[str] = set()
    for number in range(_ROUNDS):
        draws = _FEW_DRAWS if number else DRAWS
        kept = (
            wanted(findings.region, proposals, latency, ImportanceTable(known), findings.fingerprint, objective, draws=draws) - fine
        )
        chosen = narrowed(proposals, lambda candidate, kept=kept: candidate.id in kept)  # type: ignore[misc]
        if not chosen:
            break
        log.info("%d of %d candidates are scored on all images", _count(chosen), _count(proposals))
        known |= work.scores(scorer, chosen, done, done + _count(chosen))
        fine |= kept
        done += _count(chosen)
    return ImportanceTable(known)


#: What was scored on all images may lose more than it seemed to, and others are wanted then: so often at most, by so many tables.
_ROUNDS, _FEW_DRAWS = 8, 4


#: At least so many tasks, where there are so many tensors that candidates start at: what is lost with one that is killed.
_TASKS = 16


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

    def prepare(self, device: str = "") -> Callable[[_Task], Scores]:
        batches = self.batches
        if device:  # in a worker, which has copies of its own
            self.findings.graph.to(device)
            batches = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batches)
        scoring = self.scorer.prepare(self.findings, batches)
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
        subject = Subject(*self._digests, scorer.settings) if self.store is not None else None
        keys = {c.id: key_of(c) for p in proposals for c in p.candidates}
        held = self._held(subject, keys)
        exact = {c.id: Importance(0.0, 0, "exact") for p in proposals for c in p.candidates if c.exact and c.id not in held}
        left = narrowed(proposals, lambda candidate: candidate.id not in held and not candidate.exact)
        found = {**held, **exact}
        tasks = (
            [_Task(tuple(task)) for task in scorer.tasks(self.findings, left, max(_TASKS, 4 * self.executor.workers))]
            if left
            else []
        )
        done = before + len(found)
        self.progress(done, total)
        with contextlib.closing(self._run(scorer, tasks)) as results:
            for number, scores in results:
                _check(scores, {c.id for p in tasks[number].proposals for c in p.candidates}, scorer)
                if self.store is not None and subject is not None:
                    self.store.add_importances(subject, {keys[name]: importance for name, importance in scores.items()})
                found.update(scores)
                done += _count(tasks[number].proposals)
                self.progress(done, total)
        found.update(self._held(subject, keys))  # another process may have been first
        return {name: found[name] for name in keys if name in found}

    def _run(self, scorer: Scorer, tasks: Sequence[_Task]) -> Generator[tuple[int, Scores], None, None]:
        if tasks:
            yield from self.executor.run(_Job(scorer, self.findings, self.batches), tasks)

    @cached_property
    def _digests(self) -> tuple[str, str]:
        """Of the network and the data; both are read through once for all scorers."""
        return network_digest(self.findings.graph), data_digest(self.batches)

    def _held(self, subject: Subject | None, keys: Mapping[str, str]) -> dict[str, Importance]:
        if self.store is None or subject is None:
            return {}
        held = self.store.importances(subject)
        return {name: held[key] for name, key in keys.items() if key in held}


def _check(scores: Scores, asked: Set[str], scorer: Scorer) -> None:
    """What a scorer gives is of just the candidates that it was asked about, and finite numbers."""
    if not isinstance(scores, Mapping) or scores.keys() != asked:
        raise InputError(
            f"the scorer {scorer.settings:.60} must give a score for each of {', '.join(sorted(asked))}; it gave {scores!r:.200}"
        )
    for name, importance in scores.items():
        if not isinstance(importance, Importance) or not math.isfinite(importance.loss):
            raise InputError(
                f"the scorer {scorer.settings:.60} gave {importance!r} for {name!r}: expected an Importance of finite loss"
            )
