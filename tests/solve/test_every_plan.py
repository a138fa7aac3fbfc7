"""The solver against every plan, tried one by one, on thousands of small networks; and never over any budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from fxmerge.core.plan import ParetoFront
from fxmerge.errors import BudgetError, InputError
from fxmerge.solve.dominance import unbeaten_of_three
from tests.solve.small import Part, Tree, additive, as_largest, less_exponentials, random_line, random_tree

Point = tuple[float, ...]


def unbeaten(points: Iterable[Point]) -> list[Point]:
    """What no other is nowhere larger than; by comparing each with each."""
    every = sorted(set(points))
    return [p for p in every if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in every)]


def taken(plan: Sequence[Part]) -> list[int]:
    return sorted(part.candidate for part in plan if part.candidate is not None)


def points_of(front: ParetoFront) -> list[Point]:
    return list(zip(front.latencies_ns, front.losses, strict=True))


def spatial(front: ParetoFront) -> list[Point]:
    return sorted(zip(front.latencies_ns, front.amounts, front.losses, strict=True))


def test_the_front_is_that_of_all_plans_on_two_thousand_trees() -> None:
    random = np.random.default_rng(1)
    for _ in range(2000):
        tree = random_tree(random)
        front = tree.solve()
        assert points_of(front) == unbeaten((tree.latency(plan), additive(plan)) for plan in tree.plans())
        assert front.slack == 0


def test_the_published_objective_finds_the_largest_sum_of_exponentials_on_a_thousand_trees() -> None:
    random = np.random.default_rng(2)
    for number in range(1000):
        tree = random_tree(random, signed=number % 2 == 1)
        front = tree.solve(objective="layermerge", units_loss=tree.units_loss)
        plans = list(tree.plans())
        for latency_ns, loss in points_of(front):
            within = (less_exponentials(plan) for plan in plans if tree.latency(plan) <= latency_ns)
            assert loss == pytest.approx(min(within), abs=1e-7)
        assert front.fastest_ns == min(map(tree.latency, plans))
        assert front.losses[-1] == pytest.approx(min(map(less_exponentials, plans)), abs=1e-7)


@pytest.mark.parametrize("kind", ["sum", "largest"])
def test_with_a_second_resource_the_front_is_that_of_all_plans_on_a_thousand_trees(kind: str) -> None:
    random = np.random.default_rng(3)
    for _ in range(500):
        tree = random_tree(random, kind=kind)  # type: ignore[arg-type]
        front = tree.solve(second=tree.amounts)
        points = unbeaten((tree.latency(plan), tree.amount(plan), additive(plan)) for plan in tree.plans())
        assert spatial(front) == points
        assert (front.slack, front.surplus) == (0, 0)
        by_candidates = {tuple(taken(plan)): plan for plan in tree.plans()}
        for k in range(len(front)):
            plan = by_candidates[tuple(sorted(front.choose(k)))]
            assert (tree.latency(plan), tree.amount(plan), additive(plan)) == (
                front.latencies_ns[k],
                front.amounts[k],
                front.losses[k],
            )


def test_a_plan_is_never_over_its_budgets_on_ten_thousand_tables() -> None:
    random = np.random.default_rng(4)
    refusals: list[BudgetError] = []
    for number in range(10_000):
        tree = random_tree(random, most=4, kind="largest" if number % 2 else "sum")
        second = number % 4 < 2
        options = {"second": tree.amounts, "max_points": 3 + number % 3} if second else {"max_points": 2 + number % 3}
        front = tree.solve(**options)
        budget_ns, limit = int(random.integers(0, 60)), int(random.integers(5, 60))
        asked = {tree.amounts.name: limit} if second else {}
        try:
            plan = front.pick(budget_ns, **asked)  # type: ignore[arg-type]
        except BudgetError as refused:
            refusals.append(refused)
            continue
        chosen = [tree.candidates.index(merge) for merge in plan.merges]
        latency_ns, amount, loss = cost_of(tree, chosen)
        assert plan.latency_ns == latency_ns <= budget_ns
        assert plan.loss == loss
        assert not second or amount <= limit
    assert 1000 < len(refusals) < 9000
    assert all(refused.asked_ns < refused.fastest_ns or refused.least_amount is not None for refused in refusals)


def cost_of(tree: Tree, chosen: Sequence[int]) -> tuple[int, int, float]:
    """Walk the tree with these candidates, each where it starts."""
    left = set(chosen)
    latency_ns, loss = tree.remainder_ns, 0.0
    amounts = [tree.amounts.rest]
    stack = [tree.root]
    while stack:
        unit = stack.pop()
        latency_ns += tree.units_ns.get(unit.end, 0)
        amounts.append(tree.amounts.units.get(unit.end, 0))
        for chain in unit.children:
            at = 0
            while at < len(chain.units):
                here = [
                    k for k in left if tree.candidates[k].entry == chain.cuts[at] and tree.candidates[k].end in chain.cuts[at + 1 :]
                ]
                if not here:
                    stack.append(chain.units[at])
                    at += 1
                    continue
                (k,) = here
                left.remove(k)
                latency_ns, loss = latency_ns + tree.latencies_ns[k], loss + tree.losses[k]
                amounts.append(tree.amounts.candidates[tree.candidates[k].id])
                at = chain.cuts.index(tree.candidates[k].end)
    assert not left, "candidates overlap"
    return latency_ns, max(amounts) if tree.amounts.largest else sum(amounts), loss


# Thinning


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("max_points", [3, 8, 64, 128])
def test_for_every_plan_left_out_one_stands_in_within_slack_and_surplus(largest: bool, max_points: int) -> None:
    tree = random_line(np.random.default_rng(max_points), 14, 4)
    tree = as_largest(tree) if largest else tree
    exact, thin = tree.solve(second=tree.amounts), tree.solve(second=tree.amounts, max_points=max_points)
    assert len(thin) <= max_points < len(exact)
    assert thin.slack > 0
    for latency_ns, amount, loss in spatial(exact):
        stand_ins = (
            ns <= latency_ns and n <= amount + thin.surplus and lost <= loss + thin.slack + 1e-12 for ns, n, lost in spatial(thin)
        )
        assert any(stand_ins)
    assert thin.fastest_ns == exact.fastest_ns
    assert (min(thin.losses), min(thin.amounts)) == (min(exact.losses), min(exact.amounts))
    for k in range(0, len(thin), 7):
        latency_ns, amount, loss = cost_of(tree, thin.choose(k))
        assert (latency_ns, amount, loss) == (thin.latencies_ns[k], thin.amounts[k], thin.losses[k])


def test_a_front_of_three_coordinates_needs_three_points() -> None:
    tree = random_line(np.random.default_rng(0), 2, 1)
    with pytest.raises(InputError, match="max_points is 2; a front needs 3 to keep its ends"):
        tree.solve(second=tree.amounts, max_points=2)


def test_points_in_space_are_kept_by_the_definition_and_of_equal_ones_that_of_the_smallest_tie() -> None:
    random = np.random.default_rng(6)
    for size in [1, 2, 3, 4, 5, 7, 8, 9, 30, 64, 65] * 20:
        first, second, third, tie = random.integers(0, int(random.integers(1, 12)), (4, size))
        kept = unbeaten_of_three(first, second, third, tie)
        points = list(zip(first.tolist(), second.tolist(), third.tolist(), strict=True))
        assert [points[k] for k in kept] == unbeaten(points)
        for k in kept.tolist():
            assert tie[k] == min(tie[other] for other in range(size) if points[other] == points[k])


# Objectives


def test_of_a_layermerge_plan_the_loss_is_what_the_sum_lacks_and_the_plan_says_so() -> None:
    tree = random_line(np.random.default_rng(7), 6, 3)
    front = tree.solve(objective="layermerge")
    plan = front.pick(front.fastest_ns)
    covered = sum(int(m.end[1:]) - (int(m.entry[1:]) if m.entry != "x" else -1) for m in plan.merges)
    gained = sum(math.exp(-tree.losses[tree.candidates.index(m)]) for m in plan.merges)
    assert plan.loss == pytest.approx(covered - gained, abs=1e-8)
    assert plan.objective == front.objective == "layermerge"
    assert tree.solve().plan(0).objective == "additive-loss"
    assert front.losses[-1] == 0  # the network as it is


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "accuracy"}, r"objective is 'accuracy'; give one of additive-loss, layermerge"),
        ({"units_loss": {"q": 1.0}}, r"units_loss names 'q', which ends no unit\. Score again"),
        ({"units_loss": {"n0": -1.0}}, r"loss of unit 'n0' is -1\.0; it must be a finite number from 0"),
        (
            {"units_loss": {"n0": -21.0}, "objective": "layermerge"},
            r"loss of unit 'n0' is -21\.0; it must be a finite number from -20",
        ),
        ({"units_loss": {"n0": math.inf}, "objective": "layermerge"}, r"unit 'n0' is inf; it must be a finite number from -20"),
        ({"units_loss": {"output": 0.0}, "objective": "layermerge"}, r"names 'output', which is no layer but holds some"),
    ],
)
def test_an_objective_that_cannot_be_used_is_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        random_line(np.random.default_rng(0), 2, 1).solve(**options)
