"""From a front and a budget to a plan whose *measured* latency meets it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from torch.fx import GraphModule

from fxmerge.algebra.affine import Affine
from fxmerge.analysis.segments import Findings
from fxmerge.budget import Budget
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.table import Measurement
from fxmerge.errors import BudgetError
from fxmerge.measure.latency import baseline
from fxmerge.measure.progress import Progress
from fxmerge.measure.study import Trial
from fxmerge.measure.timer import Timed, Timer, compare
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import linearize
from fxmerge.solve.objective import Objective
from fxmerge.survey import Survey

log = logging.getLogger(__name__)

#: The folded original and the merged network of a plan, timed in turn.
Times: TypeAlias = tuple[Measurement, Measurement]


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

    def measure(self, plan: Plan) -> Times:
        """The folded original and the merged network of a plan, timed in turn."""
        _, merged = build_networks(self.survey.findings, plan, {})
        modules = [Timed(self.original, self.survey.arguments), Timed(merged, self.survey.arguments)]
        original, found = (self.timer or compare)(modules, target=self.survey.target)
        if self.survey.kept is not None:
            store, study = self.survey.kept
            store.add_trial(study, Trial(plan, original, found))
        return original, found

    def best_exact(self) -> tuple[Plan, Times]:
        """The fastest plan that loses nothing, if the median of its times is below the original's; else none at all."""
        plan = self.front.plan(0)
        measured = self.measure(plan)
        if measured[1].median_ns >= measured[0].median_ns and plan.merges:
            log.info("exact merges do not pay end to end here; the folded original is kept")
            plan = Plan(plan.fingerprint, (), self.front.original_ns, 0.0, self.front.objective)
            measured = self.measure(plan)
        return plan, measured

    def within(self, budget: Budget, corrections: int, progress: Progress) -> tuple[Plan, Times]:
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
        kept: tuple[Plan, Times] | None = None
        for step in range(corrections + 1):
            plan = self.front.plan(index)
            measured = self.measure(plan)
            ratio = budget.share(*(m.median_ns for m in measured))
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

    def _index(self, budget_ns: float) -> int:
        try:
            return self.front.index(math.floor(budget_ns))
        except BudgetError:
            return 0

    def _fastest(self, budget: Budget) -> tuple[Plan, Times]:
        """The fastest plan there is, if it meets the budget."""
        plan = self.front.plan(0)
        measured = self.measure(plan)
        original, least = (m.median_ns for m in measured)
        if budget.share(original, least) > 1 + self.tolerance:
            asked = budget.of_ns(original)
            raise BudgetError(
                f"asked for {asked / 1e6:.3f} ms ({original / asked:.2f}x); the fastest plan there is takes {least / 1e6:.3f} ms, "
                f"measured ({original / least:.2f}x). Ask for that or less, or offer more candidates (space=, max_kernel=).",
                asked_ns=math.floor(asked),
                fastest_ns=least,
            )
        return plan, measured
