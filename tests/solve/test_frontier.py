"""The solver against every subset of the candidates, tried one by one; and its bound, ties, order and refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain as flatten
from itertools import combinations, count, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxmerge.core.geometry import Geometry
from fxmerge.core.plan import ParetoFront
from fxmerge.core.region import Chain, Unit
from fxmerge.core.segment import Candidate
from fxmerge.core.table import Importance, ImportanceTable, LatencyTable, Measurement, Target
from fxmerge.errors import InputError
from fxmerge.solve import frontier
from fxmerge.solve.frontier import solve, solve_tables

NANO = 10**9
LOSSES = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])  # few and exact in binary: many ties, and sums to compare with ==


@dataclass(frozen=True)
class Problem:
    root: Unit
    candidates: tuple[Candidate, ...]
    latencies_ns: tuple[int, ...]
    losses: tuple[float, ...]
    units_ns: dict[str, int]
    remainder_ns: int = 0

    def solve(self, max_points: int | None = None) -> ParetoFront:
        options: dict[str, Any] = {"remainder_ns": self.remainder_ns, "original_ns": 100, "fingerprint": "f"}
        tables = (self.root, self.candidates, self.latencies_ns, self.losses)
        return solve(*tables, units_ns=self.units_ns, max_points=max_points, **options)

    def covered(self, k: int) -> frozenset[str]:
        """Ends of the units that candidate k replaces, those inside them included."""
        for unit in self.root.walk():
            for chain in unit.children:
                if self.candidates[k].end in chain.cuts[1:]:
                    start, stop = (chain.cuts.index(cut) for cut in (self.candidates[k].entry, self.candidates[k].end))
                    return frozenset(inner.end for run in chain.units[start:stop] for inner in run.walk())
        raise LookupError(k)

    def overlap(self, chosen: Sequence[int]) -> bool:
        covered = [self.covered(k) for k in chosen]
        return len(frozenset().union(*covered)) < sum(map(len, covered))

    def cost(self, chosen: Sequence[int]) -> tuple[int, float]:
        gone = frozenset().union(*(self.covered(k) for k in chosen))
        kept = sum(self.units_ns.get(unit.end, 0) for unit in self.root.walk() if unit.end not in gone)
        return kept + self.remainder_ns + sum(self.latencies_ns[k] for k in chosen), sum(self.losses[k] for k in chosen)

    def plans(self) -> Iterator[tuple[int, ...]]:
        """Every set of candidates that do not overlap."""
        indices = range(len(self.candidates))
        subsets = flatten.from_iterable(combinations(indices, size) for size in range(len(indices) + 1))
        return (chosen for chosen in subsets if not self.overlap(chosen))

    def best(self) -> dict[tuple[int, float], int]:
        """What no plan beats, and the fewest merges that reach it; by trying all."""
        fewest: dict[tuple[int, float], int] = {}
        for chosen in self.plans():
            fewest.setdefault(self.cost(chosen), len(chosen))
        left: dict[tuple[int, float], int] = {}
        for point in sorted(fewest):
            if not left or point[1] < min(loss for _, loss in left):
                left[point] = fewest[point]
        return left


def merge(entry: str, end: str) -> Candidate:
    return Candidate(entry, end, end, "identity", Geometry.identity(8, 2))


def line(*ends: str) -> Unit:
    """A network that is one chain, from ``x``."""
    return Unit("output", (), (Chain(("x", *ends), tuple(Unit(end, (end,)) for end in ends)),))


@st.composite
def problems(draw: st.DrawFn, depth: int = 2, most: int = 8) -> Problem:
    """Chains of up to 4 units with up to 2 parallel chains inside some; candidates over one or more units."""
    names = (f"n{k}" for k in count())
    places: list[tuple[str, str]] = []

    def grow_chain(entry: str, depth: int) -> Chain:
        cuts, units = [entry], []
        for _ in range(draw(st.integers(1, 4 if depth == 2 else 2))):
            end = next(names)
            branches = draw(st.sampled_from([0, 0, 1, 2])) if depth else 0
            units.append(Unit(end, (end,), tuple(grow_chain(cuts[-1], depth - 1) for _ in range(branches))))
            cuts.append(end)
        places.extend(combinations(cuts, 2))
        return Chain(tuple(cuts), tuple(units))

    root = Unit("output", (), tuple(grow_chain("x", depth) for _ in range(draw(st.sampled_from([1, 1, 2])))))
    taken = draw(st.lists(st.sampled_from(places), max_size=most))
    small = st.integers(0, 12)
    return Problem(
        root,
        tuple(merge(*place) for place in taken),
        tuple(draw(small) for _ in taken),
        tuple(draw(LOSSES) for _ in taken),
        {unit.end: draw(small) for unit in root.walk() if draw(st.integers(0, 4))},
        draw(st.integers(-5, 5)),
    )


def long_line(units: int, offers: int, seed: int) -> Problem:
    random = np.random.default_rng(seed)
    ends = [f"n{k}" for k in range(units)]
    cuts = ["x", *ends]
    stops = [k for k in range(1, units + 1) for _ in range(offers)]
    places = [(cuts[max(0, stop - int(random.integers(1, 6)))], cuts[stop]) for stop in stops]
    return Problem(
        line(*ends),
        tuple(merge(*place) for place in places),
        tuple(random.integers(10**5, 10**6, len(places)).tolist()),
        tuple((random.integers(0, 2**9, len(places)) / 2**9).tolist()),  # whole numbers of 1e-9
        dict(zip(ends, random.integers(10**5, 10**6, units).tolist(), strict=True)),
    )


def points(front: ParetoFront) -> list[tuple[int, float]]:
    return list(zip(front.latencies_ns, front.losses, strict=True))


# Exactness


@settings(max_examples=300, deadline=None)
@given(problems())
def test_front_is_that_of_all_subsets_with_the_fewest_merges(problem: Problem) -> None:
    front = problem.solve()
    assert dict(zip(points(front), (len(front.choose(k)) for k in range(len(front))), strict=True)) == problem.best()
    assert front.slack == 0


@settings(max_examples=200, deadline=None)
@given(problems(most=12))
def test_back_pointers_lead_to_plans_that_do_not_overlap_and_cost_what_the_point_says(problem: Problem) -> None:
    front = problem.solve()
    for k, point in enumerate(points(front)):
        assert not problem.overlap(front.choose(k))
        assert problem.cost(front.choose(k)) == point
        assert front.plan(k).merges == tuple(problem.candidates[c] for c in front.choose(k))


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(-5, 150))
def test_a_picked_plan_is_never_over_budget_and_none_within_it_loses_less(problem: Problem, budget_ns: int) -> None:
    front = problem.solve()
    assume(budget_ns >= front.fastest_ns)
    latency_ns, loss = problem.cost(front.choose(front.index(budget_ns)))
    assert latency_ns <= budget_ns
    assert loss == min(lost for ns, lost in map(problem.cost, problem.plans()) if ns <= budget_ns)


@settings(max_examples=100, deadline=None)
@given(problems(most=12))
def test_sums_laid_out_block_by_block_give_the_same_front(problem: Problem) -> None:
    whole = problem.solve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier, "_BLOCK", 1)
        blocks = problem.solve()
    assert points(blocks) == points(whole)
    assert [blocks.choose(k) for k in range(len(whole))] == [whole.choose(k) for k in range(len(whole))]


def test_no_candidates_leave_the_original_alone() -> None:
    front = Problem(line("a", "b"), (), (), (), {"a": 3, "b": 4, "output": 2}, -1).solve()
    assert points(front) == [(8, 0.0)]
    assert front.choose(0) == ()


def test_a_network_without_chains_is_its_own_nodes() -> None:
    assert points(Problem(Unit("output", ()), (), (), (), {"output": 5}, 2).solve()) == [(7, 0.0)]


def test_a_merge_that_is_slower_and_loses_nothing_is_not_taken() -> None:
    assert points(Problem(line("a"), (merge("x", "a"),), (5,), (0.0,), {"a": 4}).solve()) == [(4, 0.0)]


def test_a_merge_of_a_block_replaces_what_is_inside_it() -> None:
    inside = Chain(("x", "p", "q"), (Unit("p", ("p",)), Unit("q", ("q",))))
    root = Unit("output", (), (Chain(("x", "add"), (Unit("add", ("add",), (inside,)),)),))
    problem = Problem(root, (merge("x", "add"), merge("p", "q")), (7, 3), (2.0, 1.0), {"p": 10, "q": 10, "add": 1})
    front = problem.solve()
    assert points(front) == [(7, 2.0), (14, 1.0), (21, 0.0)]
    assert [front.choose(k) for k in range(3)] == [(0,), (1,), ()]


# Ties and order


def test_of_equal_latencies_the_lower_loss_stays_and_of_equal_losses_the_lower_latency() -> None:
    problem = Problem(line("a"), (merge("x", "a"),) * 4, (5, 5, 6, 5), (0.5, 0.25, 0.25, 0.5), {"a": 9})
    front = problem.solve()
    assert points(front) == [(5, 0.25), (9, 0.0)]
    assert front.choose(0) == (1,)


def test_of_equal_plans_the_one_of_fewest_merges_stays() -> None:
    for order in permutations([(("x", "a"), 2, 0.25), (("a", "b"), 2, 0.25), (("x", "b"), 4, 0.5)]):
        places, latencies, losses = zip(*order, strict=True)
        problem = Problem(line("a", "b"), tuple(merge(*p) for p in places), latencies, losses, {"a": 9, "b": 9})
        assert problem.solve().choose(0) == (places.index(("x", "b")),)


def test_of_equal_plans_of_as_many_merges_the_one_offered_first_stays() -> None:
    problem = Problem(line("a"), (merge("x", "a"),) * 3, (5, 4, 4), (0.25,) * 3, {"a": 9})
    assert problem.solve().choose(0) == (1,)


def test_candidates_are_chosen_in_graph_order_however_they_were_offered() -> None:
    branches = (Chain(("x", "p", "q"), (Unit("p", ()), Unit("q", ()))), Chain(("x", "r"), (Unit("r", ()),)))
    root = Unit("output", (), (Chain(("x", "add", "z"), (Unit("add", (), branches), Unit("z", ()))),))
    places = [("add", "z"), ("x", "r"), ("p", "q"), ("x", "p")]
    front = Problem(root, tuple(merge(*p) for p in places), (0,) * 4, (1.0,) * 4, dict.fromkeys("pqrz", 1)).solve()
    assert front.choose(0) == (3, 2, 1, 0)


@settings(max_examples=100, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_without_ties_the_order_of_the_candidates_does_not_matter(problem: Problem, random: Any) -> None:
    size = len(problem.candidates)
    problem = replace(problem, losses=tuple(float(2**k) for k in range(size)))  # no two plans lose the same
    order = random.sample(range(size), size)

    def pick(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[k] for k in order)

    mixed = replace(
        problem,
        candidates=pick(problem.candidates),
        latencies_ns=pick(problem.latencies_ns),
        losses=pick(problem.losses),
    )
    front, other = problem.solve(), mixed.solve()
    assert points(front) == points(other)
    assert [front.choose(k) for k in range(len(front))] == [pick_all(order, other.choose(k)) for k in range(len(other))]


def pick_all(order: Sequence[int], chosen: Sequence[int]) -> tuple[int, ...]:
    return tuple(order[k] for k in chosen)


# Numbers


def test_a_loss_is_rounded_up_to_a_whole_number_of_nano() -> None:
    tiny = Problem(line("a"), (merge("x", "a"),), (0,), (1.2e-9,), {"a": 1}).solve()
    assert points(tiny) == [(0, 2e-9), (1, 0.0)]
    assert Problem(line("a"), (merge("x", "a"),), (0,), (0.1,), {"a": 1}).solve().losses == (0.1, 0.0)


def test_a_thousand_tenths_sum_to_a_hundred() -> None:
    ends = [f"n{k}" for k in range(1000)]
    every = tuple(merge(*place) for place in zip(["x", *ends], ends, strict=False))
    front = Problem(line(*ends), every, (0,) * 1000, (0.1,) * 1000, dict.fromkeys(ends, 1)).solve()
    assert (len(front), front.losses[0], len(front.choose(0))) == (1001, 100.0, 1000)


def test_losses_that_round_to_one_float_are_one_point() -> None:
    problem = Problem(line("a", "b"), (merge("x", "a"), merge("a", "b")), (1, 0), (4e9, 1e-9), {"a": 100, "b": 5})
    assert 4e9 + 1e-9 == 4e9
    assert points(problem.solve()) == [(1, 4e9), (100, 1e-9), (105, 0.0)]  # of the two at 4e9 the faster


def test_results_are_plain_numbers_that_json_can_write() -> None:
    front = Problem(line("a"), (merge("x", "a"),), (0,), (0.5,), {"a": 1}).solve()
    assert {type(value) for value in front.latencies_ns} == {int}
    assert {type(value) for value in (*front.losses, front.slack)} == {float}
    assert {type(index) for index in front.choose(0)} == {int}


def test_numbers_of_numpy_are_as_good_as_those_of_python() -> None:
    problem = Problem(line("a"), (merge("x", "a"),), (np.int32(2),), (np.float32(0.1),), {"a": np.int64(5)})
    assert points(problem.solve()) == [(2, 0.100000002), (5, 0.0)]  # that is what float32 makes of a tenth


# Thinning


def excess(exact: ParetoFront, thin: ParetoFront) -> float:
    """How much lower the exact front's loss is at the budget where that shows most."""
    return max(thin.losses[thin.index(ns)] - loss for ns, loss in points(exact))


def check_thinned(problem: Problem, max_points: int) -> ParetoFront:
    exact, thin = problem.solve(), problem.solve(max_points)
    assert len(thin) <= max_points
    assert excess(exact, thin) <= thin.slack + 1e-12
    assert (points(thin)[0], points(thin)[-1]) == (points(exact)[0], points(exact)[-1])
    for k, point in enumerate(points(thin)):
        assert not problem.overlap(thin.choose(k))
        assert problem.cost(thin.choose(k)) == point
    return thin


@settings(max_examples=200, deadline=None)
@given(problems(most=14), st.integers(2, 4))
def test_thinning_keeps_the_ends_and_real_plans_and_its_bound_holds(problem: Problem, max_points: int) -> None:
    check_thinned(problem, max_points)


@pytest.mark.parametrize("max_points", [2, 3, 8, 32])
def test_thinning_a_longer_chain_keeps_its_bound(max_points: int) -> None:
    assert check_thinned(long_line(40, 5, seed=max_points), max_points).slack > 0


def test_the_slack_of_one_thinning_is_what_it_costs() -> None:
    offered = (merge("x", "a"),) * 4
    problem = Problem(line("a"), offered, (1, 2, 3, 4), (1.0, 0.75, 0.5, 0.125), {"a": 5})
    thin = problem.solve(2)
    assert points(thin) == [(1, 1.0), (5, 0.0)]
    assert thin.slack == excess(problem.solve(), thin) == 0.875


def test_the_buckets_are_as_narrow_as_the_number_of_points_allows() -> None:
    losses = (1.0, 0.6875, 0.5625, 0.09375)  # with 0 after them: thirds would cost 0.3125, dropping 0.5625 costs 0.125
    thin = Problem(line("a"), (merge("x", "a"),) * 4, (1, 2, 3, 4), losses, {"a": 5}).solve(4)
    assert (thin.losses, thin.slack) == ((1.0, 0.6875, 0.09375, 0.0), 0.125)


def test_the_slack_of_parallel_chains_adds_up() -> None:
    chains = tuple(Chain(("x", end), (Unit(end, (end,)),)) for end in "ab")
    offered = tuple(merge("x", end) for end in "ab" for _ in range(2))
    problem = Problem(Unit("output", (), chains), offered, (1, 4, 10, 40), (1.0, 0.5) * 2, {"a": 9, "b": 90})
    assert problem.solve(2).slack == 0.5 + 0.5 + 1.0  # of each chain (1, 0.5, 0), then of the sum (2, 1, 1, 0)
    assert problem.solve(3).slack == pytest.approx(excess(problem.solve(), problem.solve(3)))


def test_a_front_that_fits_is_not_thinned() -> None:
    problem = long_line(12, 4, seed=1)
    exact = problem.solve()
    thin = problem.solve(10 * len(exact))
    assert (points(thin), thin.slack) == (points(exact), 0)


# Size


def test_equal_candidates_in_their_thousands_do_not_grow_the_front() -> None:
    problem = long_line(300, 10, seed=2)
    same = replace(problem, latencies_ns=(7,) * 3000, losses=(0.5,) * 3000, units_ns=dict.fromkeys(problem.units_ns, 9))
    assert len(same.solve()) <= 301
    assert len(replace(problem, losses=(0.5,) * 3000).solve()) <= 301
    assert len(replace(problem, losses=(0.0,) * 3000).solve()) == 1


def test_a_chain_of_thousands_of_units_needs_no_recursion() -> None:
    problem = long_line(3000, 1, seed=3)
    front = problem.solve(32)
    for k in (0, -1):
        assert problem_cost_along(problem, front.choose(k)) == points(front)[k]


def problem_cost_along(problem: Problem, chosen: Sequence[int]) -> tuple[int, float]:
    """As ``Problem.cost``, for one long chain, in linear time."""
    cuts = problem.root.children[0].cuts
    place = {cut: k for k, cut in enumerate(cuts)}
    kept, at = 0, 0
    for k in chosen:
        start, stop = place[problem.candidates[k].entry], place[problem.candidates[k].end]
        assert at <= start
        kept, at = kept + sum(problem.units_ns[cut] for cut in cuts[at + 1 : start + 1]), stop
    kept += sum(problem.units_ns[cut] for cut in cuts[at + 1 :])
    return kept + sum(problem.latencies_ns[k] for k in chosen), sum(problem.losses[k] for k in chosen)


def test_units_nested_thousands_deep_need_no_recursion() -> None:
    unit = Unit("n0", ("n0",))
    for k in range(1, 3000):
        unit = Unit(f"n{k}", (f"n{k}",), (Chain(("x", unit.end), (unit,)),))
    front = solve(
        unit,
        [merge("x", "n0"), merge("x", "n5")],
        [3, 4],
        [0.5, 1.0],
        units_ns={f"n{k}": 10 for k in range(3000)},
        remainder_ns=0,
        original_ns=30000,
        fingerprint="f",
    )
    assert points(front) == [(29944, 1.0), (29993, 0.5), (30000, 0.0)]
    assert [front.choose(k) for k in range(3)] == [(1,), (0,), ()]


# Refusals

GOOD = Problem(line("a", "b"), (merge("x", "b"),), (1,), (0.5,), {"a": 3, "b": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": ()}, r"found 1 candidates, 1 latencies, 0 losses; give one"),
        ({"latencies_ns": (1, 2)}, r"found 1 candidates, 2 latencies"),
        ({"candidates": (merge("x", "q"),)}, r"'x->q identity': no chain runs from 'x' to 'q'\. Offer"),
        ({"candidates": (merge("q", "b"),)}, r"no chain runs from 'q' to 'b'"),
        ({"candidates": (merge("b", "a"),)}, r"no chain runs from 'b' to 'a'"),
        ({"candidates": (merge("a", "a"),)}, r"no chain runs from 'a' to 'a'"),
        ({"candidates": (merge("x", "output"),)}, r"no chain runs from 'x' to 'output'"),
        ({"latencies_ns": (-1,)}, r"latency of candidate 'x->b identity' is -1 ns; it cannot be negative\. Measure"),
        ({"latencies_ns": (1.5,)}, r"latency of candidate 'x->b identity' is 1\.5; it must be a whole number .* Round"),
        ({"losses": (-0.1,)}, r"loss of candidate 'x->b identity' is -0\.1; it must be a finite number from 0"),
        ({"losses": (float("nan"),)}, r"is nan; it must be"),
        ({"losses": (float("inf"),)}, r"is inf; it must be"),
        ({"losses": (1e300,)}, r"is 1e\+300; it must be"),
        ({"units_ns": {"a": -3}}, r"latency of unit 'a' is -3 ns; it cannot be negative"),
        ({"units_ns": {"a": 3.5}}, r"latency of unit 'a' is 3\.5; it must be a whole number"),
        ({"units_ns": {"q": 3}}, r"units_ns names 'q', which ends no unit\. Measure again"),
        ({"units_ns": {"a": 2**42, "b": 2**42}}, r"latencies add up to \d+ ns, over \d+\. Give nanoseconds"),
        ({"latencies_ns": (2**70,)}, r"latencies add up to 1180591620717411303427 ns"),
        ({"remainder_ns": 0.5}, r"remainder_ns is 0\.5; it must be a whole number"),
        ({"root": line("a", "b", "a")}, r"two units end at 'a'; a unit is named by its end\. Give each its own"),
    ],
)
def test_what_cannot_be_used_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(GOOD, **change).solve()


def test_losses_that_leave_64_bits_are_refused() -> None:
    problem = Problem(line("a", "b"), (merge("x", "a"), merge("a", "b")), (1, 1), (9e9, 9e9), {"a": 3, "b": 3})
    with pytest.raises(InputError, match=r"losses add up to 1\.800e\+10, over 9\.223e\+09\. Leave out"):
        problem.solve()
    either = replace(problem, candidates=(merge("x", "a"),) * 2)  # a plan takes one of them
    assert len(either.solve()) == 2


def test_a_negative_original_is_refused() -> None:
    with pytest.raises(InputError, match="original_ns is -1 ns; it cannot be negative"):
        solve(line("a"), [], [], [], units_ns={}, remainder_ns=0, original_ns=-1, fingerprint="f")


def test_a_front_of_one_point_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="max_points is 1; a front needs 2 to keep its ends"):
        GOOD.solve(1)


# Tables


def test_tables_offer_what_both_of_them_hold() -> None:
    def timed(ns: int) -> Measurement:
        return Measurement(ns, 0, 1, Target())

    whole, first, second = (merge(*place) for place in [("x", "b"), ("x", "a"), ("a", "b")])
    latency = LatencyTable(
        {"conv": timed(10), "one": timed(4)}, {whole.id: "one", first.id: "one"}, {"a": "conv", "b": "conv"}, timed(25)
    )
    importance = ImportanceTable({c.id: Importance(0.5, 8, "reconstruction") for c in (whole, second)})
    front = solve_tables(line("a", "b"), [first, second, whole], latency, importance, "f")
    assert points(front) == [(9, 0.5), (25, 0.0)]
    assert (front.candidates, front.original_ns, front.fingerprint) == ((whole,), 25, "f")
    assert front.pick(9).merges == (whole,)
