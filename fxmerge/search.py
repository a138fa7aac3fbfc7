"""From a front and a budget to a plan whose *measured* latency meets it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from torch.fx import GraphModule

from fxmerge.algebra.affine import Affine
from fxmerge.analysis.segments import Findings
from fxmerge.budget import Budget
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.segment import Candidate
from fxmerge.core.table import ImportanceTable, Measurement
from fxmerge.errors import BudgetError
from fxmerge.measure.latency import baseline
from fxmerge.measure.progress import Progress
from fxmerge.measure.reconstruction import Reconstruction
from fxmerge.measure.study import Trial
from fxmerge.measure.timer import Timed, Timer, compare
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import linearize
from fxmerge.solve.belief import Belief
from fxmerge.solve.frontier import solve_tables
from fxmerge.solve.objective import Objective
from fxmerge.solve.space import restrict
from fxmerge.survey import Survey

log = logging.getLogger(__name__)

#: Plans fitted on few images before one is chosen, and how many of the best are then fitted on all.
TRIALS, _FINALS = 16, 3
#: Tables drawn, at most, until one asks for a plan that was not tried; points of their fronts.
_DRAWS, _POINTS = 16, 1024


def build_networks(findings: Findings, plan: Plan, weights: Mapping[str, Affine]) -> tuple[GraphModule, GraphModule]:
    """The student of a plan, and its merged network."""
    student = linearize(annotate(findings.graph, plan), weights=weights, operators=findings.operators)
    return student, fuse(student, operators=findings.operators)


@dataclass(frozen=True)
class Search:
    """Find the plan whose *measured* latency meets the budget.

    Args:
        survey: the network and its tables.
        tolerance: how far over the budget the measured latency may be, as a fraction of it.
        timer: what measures whole networks; None for :func:`fxmerge.compare`.
        objective: what plans are ranked by.
    """

    survey: Survey
    tolerance: float
    timer: Timer | None = None
    objective: Objective = "additive-loss"

    @cached_property
    def front(self) -> ParetoFront:
        """Of all candidates, by the tables as they were measured."""
        return self.survey.study.front(objective=self.objective)

    @cached_property
    def original(self) -> GraphModule:
        """With its batch norms folded."""
        return baseline(self.survey.findings.graph, operators=self.survey.findings.operators)

    def measure(self, plan: Plan) -> tuple[Measurement, Measurement]:
        """The folded original and the merged network of a plan, timed in turn."""
        _, merged = build_networks(self.survey.findings, plan, {})
        modules = [Timed(self.original, self.survey.arguments), Timed(merged, self.survey.arguments)]
        original, found = (self.timer or compare)(modules, target=self.survey.target)
        if self.survey.kept is not None:
            store, study = self.survey.kept
            store.add_trial(study, Trial(plan, original, found))
        return original, found

    def best_exact(self) -> tuple[Plan, tuple[Measurement, Measurement]]:
        """The fastest plan that loses nothing, if the median of its times is below the original's; else none at all."""
        plan = self.front.plan(0)
        measured = self.measure(plan)
        if measured[1].median_ns >= measured[0].median_ns and plan.merges:
            log.info("exact merges do not pay end to end here; the folded original is kept")
            plan = Plan(plan.fingerprint, (), self.front.original_ns, 0.0, self.front.objective)
            measured = self.measure(plan)
        return plan, measured

    def within(self, budget: Budget, corrections: int, progress: Progress) -> tuple[Plan, tuple[Measurement, Measurement]]:
        """Pick, build, measure; correct the budget by what measuring says; until measured and asked agree.

        A plan is good enough when it is not over the budget by more than the tolerance. Of those the least loss is kept. The
        search ends when one is within the tolerance below as well, or when the front has no plan between the last two.

        Args:
            budget: for the whole network, measured.
            corrections: plans measured after the first, at most.
            progress: called with (done, total) plans.

        Returns:
            The plan, and the folded original and the merged network as they were timed, in turn.

        Raises:
            BudgetError: the fastest plan there is does not meet the budget either.
        """
        low, high = 0, len(self.front) - 1
        index = self._index(budget.of_ns(self.front.original_ns))
        kept: tuple[Plan, tuple[Measurement, Measurement]] | None = None
        for step in range(corrections + 1):
            plan = self.front.plan(index)
            measured = self.measure(plan)
            ratio = measured[1].median_ns / budget.of_ns(measured[0].median_ns)
            log.info("plan of %.3f ms predicted takes %.3f of the budget", (plan.latency_ns or 0) / 1e6, ratio)
            progress(step + 1, corrections + 1)
            if ratio <= 1 + self.tolerance:
                if kept is None or plan.loss < kept[0].loss:
                    kept = plan, measured
                low = max(low, index + 1)
            else:
                high = min(high, index - 1)
            if low > high or (1 - self.tolerance <= ratio <= 1 + self.tolerance) or (ratio <= 1 and index == len(self.front) - 1):
                break
            index = min(max(self._index((plan.latency_ns or 0) / ratio), low), high)
        if kept is None:
            kept = self._fastest(budget)
        return kept

    def best_near(
        self,
        found: tuple[Plan, tuple[Measurement, Measurement]],
        budget: Budget,
        scorer: Reconstruction,
        progress: Progress,
        trials: int = TRIALS,
    ) -> tuple[Plan, tuple[Measurement, Measurement], dict[str, Affine]]:
        """Of the plans that should take as long as the one found, or less, the one whose whole merged network is nearest.

        The sum of the candidates' losses sees neither how their errors act together nor what the layers behind make up for. Here
        plans are fitted whole and judged on images held out: many by few images, the best of those by all. After the one found
        come the best of smaller spaces, such as layers pruned only; then what was fitted tells which plan to try next
        (:class:`fxmerge.solve.belief.Belief`). Whichever is taken was measured, and is within the budget.

        Args:
            found, budget: what :meth:`within` gave, and was given.
            scorer: what fits.
            progress: called with (done, total) plans.
            trials: plans fitted on few images; 0 takes the one found.

        Returns:
            The plan, the folded original and the merged network as they were timed, and weights as :meth:`Reconstruction.fit`
            gives them.
        """
        plan, measured = found
        asked = budget.of_ns(measured[0].median_ns)
        over = max(1, measured[1].median_ns) / max(1, plan.latency_ns or 1)  # what the tables miss, near this plan
        most = max(self.front.fastest_ns, math.floor(asked * (1 + self.tolerance / 2) / over))
        tried = self._tried(plan, most, scorer, trials, lambda done: progress(done, trials + _FINALS))
        findings, batches = self.survey.findings, self.survey.batches
        scored = []
        for number, one in enumerate(tried[:_FINALS]):
            loss = scorer.held_out_loss(findings, one, batches) if len(tried) > 1 else one.loss
            scored.append((loss, number, one))
            progress(trials + number + 1, trials + len(tried[:_FINALS]))
        for loss, _, one in sorted(scored, key=lambda entry: entry[:2]):
            if len(scored) > 1:
                log.info("plan of %.3f ms predicted: loss %.4g alone, %.4g together", (one.latency_ns or 0) / 1e6, one.loss, loss)
            again = measured if one.merges == plan.merges else self.measure(one)
            asked = budget.of_ns(again[0].median_ns)
            if one.merges == plan.merges or again[1].median_ns <= asked * (1 + self.tolerance):
                return one, again, scorer.fit(findings, one, batches)
        return plan, measured, scorer.fit(findings, plan, batches)

    def _tried(self, plan: Plan, most_ns: int, scorer: Reconstruction, trials: int, progress: Callable[[int], None]) -> list[Plan]:
        """Plans that take no longer than this, by how near to the original they are, fitted roughly; the nearest first."""
        if plan.exact or not trials:
            return [plan]
        survey = self.survey
        belief = Belief(survey.candidates, survey.importance)
        loss_of = scorer.rough(survey.findings, survey.batches)
        generator = np.random.default_rng(scorer.seed)
        losses: dict[tuple[Candidate, ...], tuple[float, int, Plan]] = {}
        first = self._restricted(most_ns)
        pending: Plan | None = plan
        while pending is not None and len(losses) < trials:
            loss = loss_of(pending)
            log.info("%.3f ms predicted, %d merges: %.4g fitted", (pending.latency_ns or 0) / 1e6, len(pending.merges), loss)
            belief.observe(pending, loss)
            losses[pending.merges] = loss, len(losses), pending
            progress(len(losses))
            tables = (belief.table(generator if draw else None) for draw in range(len(losses) % 2, _DRAWS))
            plans = chain(first, (self._picked(survey.candidates, table, most_ns) for table in tables))
            pending = next((one for one in plans if one.merges and one.merges not in losses), None)
        return [one for _, _, one in sorted(losses.values(), key=lambda entry: entry[:2])]

    def _restricted(self, most_ns: int) -> Iterator[Plan]:
        """The best plan of each smaller space that has one: nothing fitted, layers pruned only, activations removed only.

        Losses of single candidates go wrong differently by kind, so that the front of all may miss what one of these has.
        """
        survey = self.survey
        spaces = [[c for c in survey.candidates if c.kind != "fitted"]]
        spaces += [list(restrict(survey.findings.region, survey.candidates, name)) for name in ("layers", "activations")]
        for offered in spaces:
            plan = self._picked(offered, survey.importance, most_ns)
            if (plan.latency_ns or 0) <= most_ns:
                yield plan

    def _picked(self, candidates: Sequence[Candidate], table: ImportanceTable, most_ns: int) -> Plan:
        """The plan that a table of losses asks for; its loss is the one that the measured table gives it."""
        front = self._front_of(candidates, table)
        plan = front.plan(front.index(max(most_ns, front.fastest_ns)))
        priced = self._front_of(plan.merges, self.survey.importance).plan(0)  # each merge is faster than what it replaces
        return priced if priced.merges == plan.merges else plan

    def _front_of(self, candidates: Sequence[Candidate], table: ImportanceTable) -> ParetoFront:
        findings = self.survey.findings
        tables = (findings.region, candidates, self.survey.latency, table, findings.fingerprint)
        return solve_tables(*tables, objective=self.objective, max_points=_POINTS)

    def _index(self, budget_ns: float) -> int:
        try:
            return self.front.index(math.floor(budget_ns))
        except BudgetError:
            return 0

    def _fastest(self, budget: Budget) -> tuple[Plan, tuple[Measurement, Measurement]]:
        """The fastest plan there is, if it meets the budget."""
        plan = self.front.plan(0)
        measured = self.measure(plan)
        original, least = (m.median_ns for m in measured)
        asked = budget.of_ns(original)
        if least > asked * (1 + self.tolerance):
            raise BudgetError(
                f"asked for {asked / 1e6:.3f} ms ({original / asked:.2f}x); the fastest plan there is takes {least / 1e6:.3f} ms, "
                f"measured ({original / least:.2f}x). Ask for that or less, or offer more candidates (space=, max_kernel=).",
                asked_ns=math.floor(asked),
                fastest_ns=least,
            )
        return plan, measured
