"""Plans are judged by what they lose when they are fitted whole, whatever the tables say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

import fxmerge
from fxmerge.budget import Budget
from fxmerge.core.table import ImportanceTable
from fxmerge.measure.timer import Timed
from fxmerge.search import Search
from fxmerge.survey import Survey, survey
from fxmerge.trials import Timings, best_near, try_plans
from tests.fakes import PriceTimer
from tests.small import images, network

FITTER = fxmerge.Reconstruction()


@pytest.fixture(scope="module")
def found() -> Survey:
    return survey(network(), images(4), calibration=images(192), timer=PriceTimer())


def misled(found: Survey) -> Survey:
    """The same with a table in which what loses most is said to lose least."""
    scores = found.importance.candidates
    return replace(found, importance=ImportanceTable({name: replace(i, loss=1e-4 / (1e-4 + i.loss)) for name, i in scores.items()}))


def taken(found: Survey, trials: int, speedup: float = 1.3) -> tuple[fxmerge.Plan, float, float]:
    """The plan taken, its measured speed-up, and what it loses on images that no fit saw."""
    search = Search(found, 0.03, PriceTimer())
    budget = Budget(1 / speedup)
    start = search.within(budget, 4, lambda done, total: None)
    seen: list[tuple[int, int]] = []
    plan, measured, weights = best_near(
        search, start, budget, FITTER, lambda done, total: seen.append((done, total)), trials=trials
    )
    assert seen[-1][0] == seen[-1][1]
    assert all(0 < done <= total for done, total in seen)
    batches = fxmerge.as_batches(images(128, seed=9), found.findings.graph)
    return plan, measured[0].median_ns / measured[1].median_ns, FITTER.work(found.findings, batches).loss_of(plan, weights)


def test_a_table_that_is_wrong_is_found_out_by_fitting(found: Survey) -> None:
    _, speedup, by_table = taken(misled(found), 0)
    _, tried_speedup, by_trials = taken(misled(found), 12)
    assert by_trials < 0.5 * by_table
    assert min(speedup, tried_speedup) >= 1.3 / 1.03


def begun(found: Survey, speedup: float, timer: fxmerge.Timer | None = None) -> tuple[Timings, fxmerge.Plan]:
    """A budget, and the plan that the tables have for it."""
    search = Search(found, 0.03, timer or PriceTimer())
    timings = Timings(search, Budget(1 / speedup))
    plan = search.front.plan(search.front.index(int(search.front.original_ns / speedup)))
    timings.add(plan, search.measure(plan))
    return timings, plan


def fitted_roughly(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[object, ...], tuple[fxmerge.Plan, float]]:
    """Every plan that is fitted on few images from now on, and what it loses."""
    seen: dict[tuple[object, ...], tuple[fxmerge.Plan, float]] = {}
    rough = fxmerge.Reconstruction.rough

    def watched(self: fxmerge.Reconstruction, *data: Any) -> Callable[[fxmerge.Plan], float]:
        loss_of = rough(self, *data)
        return lambda plan: seen.setdefault(plan.merges, (plan, loss_of(plan)))[1]

    monkeypatch.setattr(fxmerge.Reconstruction, "rough", watched)
    return seen


def test_every_plan_asked_for_is_within_the_limit_and_has_the_loss_that_the_table_measured_gives_it(
    found: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings, start = begun(found, 1.3)
    seen, done = fitted_roughly(monkeypatch), list[int]()
    finals = try_plans(timings, start, FITTER, 6, done.append)
    assert done == list(range(1, len(seen) + 1))
    assert len(seen) > 2
    for plan, _ in seen.values():
        assert plan.latency_ns is not None
        assert plan.latency_ns <= 1.001 * timings.most_ns
        assert plan.loss == pytest.approx(sum(found.importance.loss(merge.id) for merge in plan.merges), abs=1e-8)
    assert [plan.merges for plan in finals] == sorted(seen, key=lambda merges: seen[merges][1])[:3]


def test_the_best_plans_of_smaller_spaces_are_tried_whatever_the_table_says_of_others(
    found: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings, start = begun(misled(found), 1.1)
    seen = fitted_roughly(monkeypatch)
    try_plans(timings, start, FITTER, 4, lambda done: None)
    search, most = timings.search, timings.most_ns
    tables = search.survey.findings.region, search.survey.candidates, search.survey.latency, search.survey.importance
    fronts = [fxmerge.solve(*tables, search.survey.findings.fingerprint, space=name) for name in ("layers", "activations")]
    there = [front.plan(front.index(most)).merges for front in fronts if front.fastest_ns <= most]
    assert there
    assert set(there) <= set(seen)


class Slower(PriceTimer):
    """Merged networks take longer than the tables say, by this part; all of them, or the first few that are timed."""

    def __init__(self, by: float, first: int = 1_000) -> None:
        super().__init__()
        self.by, self.left = by, first

    def __call__(self, modules: Sequence[Timed], **how: Any) -> tuple[fxmerge.Measurement, ...]:
        original, *merged = super().__call__(modules, **how)
        self.left -= 1
        by = self.by if self.left >= 0 else 0.0
        return original, *(replace(m, median_ns=round(m.median_ns * (1 + by))) for m in merged)


def test_no_plan_is_taken_that_takes_longer_than_asked_though_the_tables_say_otherwise(found: Survey) -> None:
    slow = Timings(Search(found, 0.03, Slower(0.1)), Budget(1 / 1.3))
    faster = slow.search.front.plan(0)
    slow.add(faster, slow.search.measure(faster))
    assert slow.most_ns < 0.95 * slow.search.front.original_ns / 1.3
    finals = try_plans(slow, faster, FITTER, 8, lambda done: None)
    assert finals
    for plan in finals:
        original, merged = slow.of(plan)
        assert merged.median_ns <= original.median_ns / 1.3 * 1.03


def test_a_first_timing_that_was_too_slow_keeps_no_plan_out_that_meets_the_budget(
    found: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fitted_roughly(monkeypatch)
    timings = Timings(Search(found, 0.03, Slower(0.08, first=1)), Budget(1 / 1.3))
    start = timings.search.front.plan(timings.search.front.index(int(timings.search.front.original_ns / 1.42)))
    timings.add(start, timings.search.measure(start))
    limit = timings.most_ns
    finals = try_plans(timings, start, FITTER, 12, lambda done: None)
    assert timings.most_ns > 1.02 * limit
    assert any((plan.latency_ns or 0) > limit for plan, _ in seen.values())
    assert finals


class Scripted(PriceTimer):
    """Merged networks take these parts of the original's time, one after the other."""

    def __init__(self, *shares: float) -> None:
        super().__init__()
        self.shares = list(shares)

    def __call__(self, modules: Sequence[Timed], **how: Any) -> tuple[fxmerge.Measurement, ...]:
        original, merged = super().__call__(modules, **how)
        return original, replace(merged, median_ns=round(original.median_ns * self.shares.pop(0)))


@pytest.mark.parametrize(
    ("shares", "meets", "decided"),
    [
        ((0.8, 0.82), True, 0.82),
        ((0.8, 0.95, 0.82), True, 0.82),
        ((0.95, 0.8, 0.82), True, 0.82),
        ((0.8, 0.95, 0.97), False, 0.95),
        ((0.95, 0.97), False, 0.97),
    ],
)
def test_a_plan_meets_the_budget_when_two_timings_of_it_do(
    found: Survey, shares: tuple[float, ...], meets: bool, decided: float
) -> None:
    timer = Scripted(*shares)
    timings = Timings(Search(found, 0.03, timer), Budget(0.9))
    plan = timings.search.front.plan(timings.search.front.index(int(timings.search.front.original_ns / 1.05)))
    timings.add(plan, timings.search.measure(plan))
    assert timings.meet(plan) is meets
    assert timings.meet(plan) is meets
    assert not timer.shares
    original, merged = timings.of(plan)
    assert merged.median_ns / original.median_ns == pytest.approx(decided, abs=1e-4)
    middle = sorted(shares)[1] if len(shares) == 3 else sum(shares) / 2
    assert timings.most_ns == pytest.approx(0.9 / middle * (plan.latency_ns or 0), rel=1e-4)


class Kind(PriceTimer):
    """Every merged network seems as fast as asked when it is timed first, and is slower by this than the tables say after."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def __call__(self, modules: Sequence[Timed], **how: Any) -> tuple[fxmerge.Measurement, ...]:
        original, merged = super().__call__(modules, **how)
        again = self.asked[-1] in self.asked[:-2]
        return original, replace(merged, median_ns=round(merged.median_ns * (1 + self.by) if again else original.median_ns / 1.3))


@pytest.mark.parametrize("trials", [1, 6])
def test_plans_that_only_their_first_timing_was_kind_to_are_left_for_faster_ones(found: Survey, trials: int) -> None:
    search = Search(found, 0.03, Kind(0.1))
    plan = search.front.plan(search.front.index(int(search.front.original_ns / 1.3)))
    start = plan, search.measure(plan)
    taken, times, _ = best_near(search, start, Budget(1 / 1.3), FITTER, lambda done, total: None, trials=trials)
    assert (taken.latency_ns or 0) <= search.front.original_ns / 1.3 / 1.1 * 1.03
    assert times[1].median_ns <= times[0].median_ns / 1.3 * 1.03


def test_the_plan_found_is_taken_where_none_meets_the_budget_when_it_is_timed_again(
    found: Survey, caplog: pytest.LogCaptureFixture
) -> None:
    search = Search(found, 0.03, Kind(10.0))
    plan = search.front.plan(search.front.index(int(search.front.original_ns / 1.3)))
    start = plan, search.measure(plan)
    taken, times, _ = best_near(search, start, Budget(1 / 1.3), FITTER, lambda done, total: None, trials=3)
    assert (taken, times) == start
    assert "met the budget twice" in caplog.text


def test_a_plan_that_is_nearest_and_too_slow_is_passed_over(found: Survey, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fitted_roughly(monkeypatch)
    timings, start = begun(found, 1.3)
    first = try_plans(timings, start, FITTER, 8, lambda done: None)[0]
    other, _ = begun(found, 1.3)
    meet = other.meet
    monkeypatch.setattr(other, "meet", lambda plan: plan.merges != first.merges and meet(plan))
    finals = try_plans(other, start, FITTER, 8, lambda done: None)
    assert first.merges in seen
    assert first.merges not in [plan.merges for plan in finals]
    assert finals


def test_the_plans_that_lose_least_on_few_images_are_fitted_on_all_and_of_those_the_best_is_taken(
    found: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    roughly = fitted_roughly(monkeypatch)
    wholly: dict[tuple[object, ...], float] = {}
    held_out_loss = fxmerge.Reconstruction.held_out_loss

    def fitted_wholly(self: fxmerge.Reconstruction, findings: Any, plan: fxmerge.Plan, batches: Any) -> float:
        return wholly.setdefault(plan.merges, held_out_loss(self, findings, plan, batches))

    monkeypatch.setattr(fxmerge.Reconstruction, "held_out_loss", fitted_wholly)
    plan, _, _ = taken(misled(found), 8)
    assert list(wholly) == sorted(roughly, key=lambda merges: roughly[merges][1])[:3]
    assert wholly[plan.merges] == min(wholly.values())


def test_no_plan_is_fitted_twice_and_the_search_stands_still_where_there_is_no_other(
    found: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[tuple[str, ...]] = []
    rough = fxmerge.Reconstruction.rough

    def counted(self: fxmerge.Reconstruction, *args: object) -> object:
        loss_of = rough(self, *args)  # type: ignore[arg-type]
        return lambda plan: (fitted.append(tuple(m.id for m in plan.merges)), loss_of(plan))[1]

    monkeypatch.setattr(fxmerge.Reconstruction, "rough", counted)
    few = replace(found, proposals=found.proposals[:2])
    taken(few, 40, speedup=1.05)
    assert len(fitted) == len(set(fitted)) < 40


def test_a_plan_without_loss_is_taken_as_it_is(found: Survey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxmerge.Reconstruction, "rough", None)
    front = Search(found, 0.03, PriceTimer()).front
    assert front.plan(len(front) - 1).exact
    plan, _, _ = taken(found, 5, speedup=1.0)
    assert plan.exact


def test_layers_to_fit_that_are_not_there_are_told_before_anything_is_measured() -> None:
    timer = PriceTimer()
    with pytest.raises(fxmerge.InputError, match="stay names 'typo', which is no layer"):
        survey(network(), images(4), calibration=images(8), timer=timer, scorer=fxmerge.Reconstruction(stay=("typo",)))
    assert not timer.asked
