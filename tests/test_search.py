"""Plans are judged by what they lose when they are fitted whole, whatever the tables say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import fxmerge
from fxmerge.budget import Budget
from fxmerge.core.table import ImportanceTable
from fxmerge.search import Search
from fxmerge.survey import Survey, survey
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
    plan, measured, weights = search.best_near(start, budget, FITTER, lambda done, total: seen.append((done, total)), trials=trials)
    assert seen[-1][0] == seen[-1][1]
    assert all(0 < done <= total for done, total in seen)
    batches = fxmerge.as_batches(images(128, seed=9), found.findings.graph)
    return plan, measured[0].median_ns / measured[1].median_ns, FITTER.work(found.findings, batches).loss_of(plan, weights)


def test_a_table_that_is_wrong_is_found_out_by_fitting(found: Survey) -> None:
    _, speedup, by_table = taken(misled(found), 0)
    _, tried_speedup, by_trials = taken(misled(found), 12)
    assert by_trials < 0.5 * by_table
    assert min(speedup, tried_speedup) >= 1.3 / 1.03


def test_every_plan_tried_is_within_the_budget_and_has_the_loss_that_the_table_measured_gives_it(found: Survey) -> None:
    search = Search(found, 0.03, PriceTimer())
    most = int(search.front.original_ns / 1.3)
    start = search.front.plan(search.front.index(most))
    done: list[int] = []
    tried = search._tried(start, most, FITTER, 6, done.append)
    assert done == list(range(1, len(tried) + 1))
    assert len(tried) > 2
    for plan in tried:
        assert plan.latency_ns is not None
        assert plan.latency_ns <= most
        assert plan.loss == pytest.approx(sum(found.importance.loss(merge.id) for merge in plan.merges), abs=1e-8)


def test_the_best_plans_of_smaller_spaces_are_tried_whatever_the_table_says_of_others(found: Survey) -> None:
    search = Search(misled(found), 0.03, PriceTimer())
    most = int(search.front.original_ns / 1.1)
    tried = {plan.merges for plan in search._tried(search.front.plan(search.front.index(most)), most, FITTER, 4, lambda done: None)}
    tables = search.survey.findings.region, search.survey.candidates, search.survey.latency, search.survey.importance
    fronts = [fxmerge.solve(*tables, search.survey.findings.fingerprint, space=name) for name in ("layers", "activations")]
    there = [front.plan(front.index(most)).merges for front in fronts if front.fastest_ns <= most]
    assert there
    assert set(there) <= tried


def test_the_plans_that_lose_least_on_few_images_are_fitted_on_all_and_of_those_the_best_is_taken(
    found: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    roughly: dict[tuple[object, ...], float] = {}
    wholly: dict[tuple[object, ...], float] = {}
    rough, held_out_loss = fxmerge.Reconstruction.rough, fxmerge.Reconstruction.held_out_loss

    def fitted_roughly(self: fxmerge.Reconstruction, *data: Any) -> Callable[[fxmerge.Plan], float]:
        loss_of = rough(self, *data)
        return lambda plan: roughly.setdefault(plan.merges, loss_of(plan))

    def fitted_wholly(self: fxmerge.Reconstruction, findings: Any, plan: fxmerge.Plan, batches: Any) -> float:
        return wholly.setdefault(plan.merges, held_out_loss(self, findings, plan, batches))

    monkeypatch.setattr(fxmerge.Reconstruction, "rough", fitted_roughly)
    monkeypatch.setattr(fxmerge.Reconstruction, "held_out_loss", fitted_wholly)
    plan, _, _ = taken(misled(found), 8)
    assert list(wholly) == sorted(roughly, key=roughly.__getitem__)[:3]
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
