"""From a front and a budget to a plan whose *measured* latency meets it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch.fx import GraphModule

from fxmerge.algebra.affine import Affine
from fxmerge.analysis.segments import Findings
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.table import Measurement
from fxmerge.errors import BudgetError
from fxmerge.measure.latency import baseline
from fxmerge.measure.reconstruction import Reconstruction
from fxmerge.measure.study import Trial
from fxmerge.measure.timer import Progress, Timed, Timer, compare
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import linearize
from fxmerge.solve.objective import Objective
from fxmerge.survey import Survey

log = logging.getLogger(__name__)


def build_networks(findings: Findings, plan: Plan, weights: Mapping[str, Affine]) -> tuple[GraphModule, GraphModule]:
    """The student of a plan, and its merged network."""
    student = linearize(annotate(findings.graph, plan), weights=weights, operators=findings.operators)
    return student, fuse(student, operators=findings.operators)


@dataclass(frozen=True)
class Search:
    """Find the plan whose *measured* latency meets the budget.

    Args:
        found: the network and its tables.
        tolerance: how far over the budget the measured latency may be, as a fraction of it.
        timer: what measures whole networks; None for :func:`fxmerge.compare`.
        objective: what plans are ranked by.
    """

    found: Survey
    tolerance: float
    timer: Timer | None = None
    objective: Objective = "additive-loss"

    @cached_property
    def front(self) -> ParetoFront:
        return self.found.study.front(objective=self.objective)

    @cached_property
    def original(self) -> GraphModule:
        """With its batch norms folded."""
        return baseline(self.found.findings.graph, operators=self.found.findings.operators)

    def measure(self, plan: Plan) -> tuple[Measurement, Measurement]:
        """The folded original and the merged network of a plan, timed in turn."""
        _, merged = build_networks(self.found.findings, plan, {})
        modules = [Timed(self.original, self.found.arguments), Timed(merged, self.found.arguments)]
        original, found = (self.timer or compare)(modules, target=self.found.target)
        if self.found.kept is not None:
            store, study = self.found.kept
            store.add_trial(study, Trial(plan, original, found))
        return original, found

    def best_exact(self) -> tuple[Plan, tuple[Measurement, Measurement]]:
        """The fastest plan that loses nothing, if it is measurably faster; else none at all."""
        plan = self.front.plan(0)
        measured = self.measure(plan)
        if measured[1].median_ns >= measured[0].median_ns and plan.merges:
            log.info("exact merges do not pay end to end here; the folded original is kept")
            plan = Plan(plan.fingerprint, (), self.front.original_ns, 0.0, self.front.objective)
            measured = self.measure(plan)
        return plan, measured

    def within(
        self, fraction: float | None, latency_ms: float | None, corrections: int, progress: Progress
    ) -> tuple[Plan, tuple[Measurement, Measurement]]:
        """Pick, build, measure; correct the budget by what measuring says; until measured and asked agree.

        A plan is good enough when it is not over the budget by more than the tolerance. Of those the least loss is kept. The
        search ends when one is within the tolerance below as well, or when the front has no plan between the last two.
        """
        budget = self.front.original_ns * fraction if fraction is not None else (latency_ms or 0.0) * 1e6
        low, high = 0, len(self.front) - 1
        index = self._index(budget)
        kept: tuple[Plan, tuple[Measurement, Measurement]] | None = None
        for step in range(corrections + 1):
            plan = self.front.plan(index)
            measured = self.measure(plan)
            asked = measured[0].median_ns * fraction if fraction is not None else budget
            ratio = measured[1].median_ns / asked
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
            kept = self._fastest(fraction, budget)
        return kept

    def best_near(
        self,
        found: tuple[Plan, tuple[Measurement, Measurement]],
        fraction: float | None,
        latency_ms: float | None,
        scorer: Reconstruction,
        progress: Progress,
        trials: int = 5,
    ) -> tuple[Plan, tuple[Measurement, Measurement], dict[str, Affine]]:
        """Of the plans that should take as long as the one found, the one whose whole merged network is nearest to the original.

        The sum of the candidates' losses does not see how their errors act together; here the plans near the budget are
        fitted and scored whole. Each is measured again before it is taken.
        """
        plan, measured = found
        asked = measured[0].median_ns * fraction if fraction is not None else (latency_ms or 0.0) * 1e6
        over = max(1, measured[1].median_ns) / max(1, plan.latency_ns or 1)  # what the tables miss, near this plan
        high = self.front.index(max(self.front.fastest_ns, math.floor(asked * (1 + self.tolerance / 2) / over)))
        low = self.front.index(max(self.front.fastest_ns, math.floor(asked * (1 - 1.5 * self.tolerance) / over)))
        indices = {round(low + (high - low) * step / max(1, trials - 1)) for step in range(trials)}
        near = [plan, *(p for i in sorted(indices) if (p := self.front.plan(i)).merges != plan.merges)]
        scored = []
        for number, one in enumerate(near):
            weights, loss = scorer.fit_and_score(self.found.findings, one, self.found.batches)
            scored.append((loss, number, one, weights))
            progress(number + 1, len(near))
        for loss, number, one, weights in sorted(scored, key=lambda entry: entry[:2]):
            log.info("plan of %.3f ms predicted: loss %.4g alone, %.4g together", (one.latency_ns or 0) / 1e6, one.loss, loss)
            again = measured if number == 0 else self.measure(one)
            asked = again[0].median_ns * fraction if fraction is not None else asked
            if number == 0 or again[1].median_ns <= asked * (1 + self.tolerance):
                return one, again, weights
        raise AssertionError("the plan found is among those tried")

    def _index(self, budget_ns: float) -> int:
        try:
            return self.front.index(math.floor(budget_ns))
        except BudgetError:
            return 0

    def _fastest(self, fraction: float | None, budget: float) -> tuple[Plan, tuple[Measurement, Measurement]]:
        """The fastest plan there is, if it meets the budget."""
        plan = self.front.plan(0)
        measured = self.measure(plan)
        original, found = (m.median_ns for m in measured)
        asked = original * fraction if fraction is not None else budget
        if found > asked * (1 + self.tolerance):
            raise BudgetError(
                f"asked for {asked / 1e6:.3f} ms ({original / asked:.2f}x); the fastest plan there is takes {found / 1e6:.3f} ms, "
                f"measured ({original / found:.2f}x). Ask for that or less, or offer more candidates (space=, max_kernel=).",
                asked_ns=math.floor(asked),
                fastest_ns=found,
            )
        return plan, measured
