"""Picking by latency and by a second resource: what is taken, and what is said where nothing fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fxmerge.core.plan import ParetoFront
from fxmerge.core.region import Chain, Unit
from fxmerge.core.resource import Resource
from fxmerge.errors import BudgetError, InputError
from tests.solve.small import Tree, candidate, random_line

LINE = Unit("output", (), (Chain(("x", "a", "b"), (Unit("a", ("a",)), Unit("b", ("b",)))),))
OFFERED = (candidate("x", "a", 0), candidate("a", "b", 1), candidate("x", "b", 2))
COUNTS = Resource("parameters", {OFFERED[0].id: 7, OFFERED[1].id: 9, OFFERED[2].id: 30}, {"a": 10, "b": 10}, rest=100)
TREE = Tree(LINE, OFFERED, (6, 5, 4), (0.5, 0.25, 0.125), {"a": 10, "b": 10}, {}, COUNTS, 0)


def front_of(resource: Resource = COUNTS) -> ParetoFront:
    return replace(TREE, amounts=resource).solve(second=resource)


def test_the_amount_of_a_plan_is_that_of_its_parts_and_the_rest() -> None:
    front = front_of()
    points = list(zip(front.latencies_ns, front.amounts, front.losses, strict=True))
    assert points == [(4, 130, 0.125), (11, 116, 0.75), (15, 119, 0.25), (16, 117, 0.5), (20, 120, 0.0)]
    assert front.second == "parameters"


def test_the_least_loss_within_both_budgets_is_picked() -> None:
    front = front_of()
    assert front.pick(15).merges == (OFFERED[2],)
    assert front.pick(15, parameters=129).merges == (OFFERED[1],)
    assert front.pick(15, parameters=118).merges == OFFERED[:2]
    assert front.pick(100, parameters=120).merges == ()


@pytest.mark.parametrize("limit", ["many", [1], True, float("nan")])
def test_a_limit_that_is_no_number_is_told(limit: object) -> None:
    with pytest.raises(InputError, match="parameters must be a number, the most that a plan may take, found"):
        front_of().within(parameters=limit)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="parameters must be a number"):
        front_of().pick(100, parameters=limit)  # type: ignore[arg-type]


def test_within_a_limit_the_front_has_two_coordinates_again() -> None:
    within = front_of().within(parameters=119)
    assert (within.latencies_ns, within.losses, within.second) == ((11, 15), (0.75, 0.25), "")
    assert within.amounts == (116, 119)
    assert within.plan(1).merges == (OFFERED[1],)
    everything = front_of().within()
    assert list(zip(everything.latencies_ns, everything.losses, strict=True)) == list(
        zip(TREE.solve().latencies_ns, TREE.solve().losses, strict=True)
    )


def test_the_largest_amount_counts_where_the_resource_is_a_maximum() -> None:
    peak = replace(COUNTS, name="peak_bytes", largest=True, rest=8)
    front = front_of(peak)
    assert sorted(set(front.amounts)) == [9, 10, 30]
    assert front.pick(100, peak_bytes=29).merges == ()
    assert front.pick(100, peak_bytes=9).merges == OFFERED[:2]
    assert set(front_of(replace(peak, rest=50)).amounts) == {50}


def test_a_limit_that_nothing_keeps_to_names_the_least_there_is() -> None:
    with pytest.raises(BudgetError, match=r"no plan takes 115 parameters or less; the least there is takes 116\. Ask") as told:
        front_of().pick(20, parameters=115)
    assert (told.value.resource, told.value.asked_amount, told.value.least_amount) == ("parameters", 115, 116)


def test_where_both_budgets_together_are_too_little_the_least_of_each_is_named() -> None:
    message = r"no plan runs in 0\.000 ms with 120 parameters or less; in that time the least is 130, with so much the fastest"
    with pytest.raises(BudgetError, match=message) as told:
        front_of().pick(10, parameters=120)
    assert (told.value.asked_ns, told.value.fastest_ns, told.value.least_amount) == (10, 11, 130)


def test_a_latency_that_nothing_keeps_to_names_the_fastest() -> None:
    with pytest.raises(BudgetError, match="no plan runs in 0.000 ms") as told:
        front_of().pick(3)
    assert told.value.fastest_ns == 4
    with pytest.raises(BudgetError, match="no plan runs in 0.000 ms") as told:
        front_of().pick(3, parameters=1000)
    assert told.value.fastest_ns == 4


def test_a_limit_on_what_was_not_solved_for_is_refused() -> None:
    with pytest.raises(InputError, match="solved for parameters beside latency; solve with second= to pick by peak_bytes"):
        front_of().pick(20, peak_bytes=3)
    with pytest.raises(InputError, match="solved for latency alone; solve with second= to pick by parameters"):
        TREE.solve().pick(20, parameters=3)


@pytest.mark.parametrize(
    ("resource", "message"),
    [
        (replace(COUNTS, candidates={}), r"parameters of candidate 'x->a .*' is missing\. Count again"),
        (replace(COUNTS, units={"q": 1}), r"parameters names 'q', which ends no unit\. Count again"),
        (replace(COUNTS, units={"a": -1}), r"parameters of unit 'a' is -1; it cannot be negative"),
        (replace(COUNTS, units={"a": 1.5}), r"parameters of unit 'a' is 1\.5; it must be a whole number\. Round"),
        (replace(COUNTS, units={"a": 2**62, "b": 2**62}), r"amounts of the second resource add up to \d+, over"),
        (replace(COUNTS, rest=0.5), r"size of the rest of parameters is 0\.5; it must be a whole number"),
    ],
)
def test_amounts_that_cannot_be_used_are_named(resource: Resource, message: str) -> None:
    with pytest.raises(InputError, match=message):
        front_of(resource)


def test_of_equal_plans_with_equal_amounts_the_one_of_fewest_merges_stays() -> None:
    nothing = Resource("parameters", {c.id: 1 for c in OFFERED} | {OFFERED[2].id: 2}, {"a": 5, "b": 5})
    tree = replace(TREE, latencies_ns=(2, 2, 4), losses=(0.25, 0.25, 0.5), amounts=nothing)
    assert tree.solve(second=nothing).choose(0) == (2,)


def test_the_index_of_a_front_of_three_coordinates_is_that_within_a_limit() -> None:
    tree = random_line(np.random.default_rng(1), 6, 3)
    front = tree.solve(second=tree.amounts)
    flat = tree.solve()
    for budget_ns in flat.latencies_ns:
        assert front.within().index(budget_ns) == flat.index(budget_ns)
        assert front.pick(budget_ns).loss == flat.pick(budget_ns).loss
    with pytest.raises(InputError, match=rf"this front has {front.second} beside latency; take the index of within\(\), or pick"):
        front.index(flat.fastest_ns)
