"""What was seen of plans is believed of their merges, and, less, of what is like them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fxmerge.core.geometry import Geometry
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate
from fxmerge.core.table import Importance, ImportanceTable
from fxmerge.solve.belief import Belief

KINDS = ("fitted", "fitted", "composed", "composed", "identity")
CANDIDATES = tuple(
    Candidate(f"in{n}", f"exit{n}", f"exit{n}", kind, Geometry.identity(8, 2))  # type: ignore[arg-type]
    for n, kind in enumerate(KINDS)
)
LOSSES = (0.02, 0.03, 2.0, 3.0, 1.0)


def belief(losses: tuple[float, ...] = LOSSES) -> Belief:
    table = ImportanceTable({c.id: Importance(loss, 9, "made up") for c, loss in zip(CANDIDATES, losses, strict=True)})
    return Belief(CANDIDATES, table)


def plan(*numbers: int) -> Plan:
    return Plan("", tuple(CANDIDATES[n] for n in numbers))


def expected(found: Belief) -> list[float]:
    return [found.table().loss(c.id) for c in CANDIDATES]


def test_before_any_plan_is_seen_the_order_is_that_of_the_losses_measured_and_large_ones_count_for_less() -> None:
    losses = expected(belief())
    assert sorted(LOSSES) == [loss for _, loss in sorted(zip(losses, LOSSES, strict=True))]
    assert 1.0 < losses[3] / losses[0] < LOSSES[3] / LOSSES[0]


def test_a_plan_of_one_merge_tells_what_it_loses() -> None:
    found = belief()
    found.observe(plan(2), 0.004)
    assert expected(found)[2] == pytest.approx(0.004, rel=0.05)


def test_a_plan_of_two_tells_of_the_second_what_the_first_does_not() -> None:
    found = belief()
    found.observe(plan(0), 0.002)
    found.observe(plan(0, 1), 0.012)
    losses = expected(found)
    assert losses[0] == pytest.approx(0.002, rel=0.2)
    assert losses[1] == pytest.approx(0.01, rel=0.2)


def test_what_is_seen_of_one_kind_is_expected_of_that_kind_more_than_of_others() -> None:
    found = belief((0.5,) * 5)
    found.observe(plan(2), 0.01)
    losses = expected(found)
    assert losses[2] < losses[3] < 0.7 * losses[0]
    assert losses[0] == pytest.approx(losses[4])


def test_a_table_drawn_keeps_to_what_was_seen_and_is_open_about_the_rest() -> None:
    found = belief()
    found.observe(plan(2), 0.004)
    generator = np.random.default_rng(0)
    drawn = np.log([[table.loss(c.id) for c in CANDIDATES] for table in (found.table(generator) for _ in range(300))])
    spread = drawn.std(0)
    assert spread[2] < 0.15
    assert 0.3 < spread[3] < 1.0 < spread[0]
    assert drawn[:, 2].mean() == pytest.approx(math.log(0.004), abs=0.05)


def test_the_same_generator_draws_the_same_table() -> None:
    tables = [belief().table(np.random.default_rng(3)) for _ in range(2)]
    assert tables[0] == tables[1]
    assert tables[0] != belief().table(np.random.default_rng(4))


def test_what_loses_nothing_goes_on_losing_nothing() -> None:
    table = ImportanceTable({c.id: Importance(0.0, 0, "exact") for c in CANDIDATES})
    found = Belief(CANDIDATES, table)
    found.observe(plan(0, 1), 0.1)
    assert expected(found) == [0.0] * len(CANDIDATES)


def test_tables_drawn_are_such_that_the_solver_takes() -> None:
    """Losses as bad as can be stay so, and those below 0, which chance made, are small ones above it."""
    found = belief((1e6, 0.03, -2e-3, 3.0, 1.0))
    found.observe(plan(0, 1), 1e-9)
    found.observe(plan(2), 5.0)
    for number in range(20):
        losses = [found.table(np.random.default_rng(number)).loss(c.id) for c in CANDIDATES]
        assert all(0 <= loss <= 1e6 for loss in losses)
    assert expected(found)[2] == pytest.approx(5.0, rel=0.1)
