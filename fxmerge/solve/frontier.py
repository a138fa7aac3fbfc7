"""Every plan that no other plan beats, for every budget at once.

Bellman's recurrence over the cuts 0..n of a chain, as in LayerMerge (Kim, El Halabi, Ji, Song; ICML 2024,
arXiv 2406.12837), but on whole fronts of (latency, loss), where LayerMerge fills a grid over time::

    front[0] = {(0, 0)}
    front[j] = prune(front[j-1] + leave(unit j)  |  union over i < j of front[i] + candidates(i, j))
    leave(unit) = the unit's own latency + the sum of the last fronts of its child chains

``+`` is the Minkowski sum. A candidate from cut i to cut j replaces all between them, children included. The network
is the root unit, left alone. What adds up as loss, and that only the loss of a part is rounded, once, to a whole number of
1e-9, is said in :mod:`fxmerge.solve.objective`; all sums are of integers.

With a second resource the fronts have three coordinates, (latency, loss, amount), of which a sum adds the first two and adds
the amounts or takes the larger one. All that follows holds coordinate by coordinate.

Slack. Say that F covers P within s if each p in P has an f in F with latency(f) <= latency(p) and
loss(f) <= loss(p) + s. Let F cover P within s, and G cover Q within t. Then F | G covers P | Q within max(s, t);
F + G covers P + Q within s + t (add the inequalities); prune(F) covers P within s (beating is transitive); and a
thinned F, which has for each f in F a point no slower and at most g worse, covers P within s + g. There are no other
steps, so the slack they add up to holds for the result: at no budget is the exact front better by more. Thinning only
leaves points out, so those that stay are real plans. It keeps the fastest and the one of least loss, and so do sums,
unions and prune: the two ends of a front are always exact.

In three dimensions thinning is coarser in the amount as well: a stand-in is no slower, at most g worse, and takes at most h
more. Slacks in the amount add up in sums where amounts do; where the larger amount counts, so does the larger slack. So for
every plan of latency T, amount A and loss L there is a point with at most T, A + surplus and L + slack. The fastest point, the
one of least loss and the one of least amount always stay.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fxmerge.core.plan import ParetoFront
from fxmerge.core.region import Chain, Unit
from fxmerge.core.resource import Resource
from fxmerge.core.segment import Candidate
from fxmerge.core.table import ImportanceTable, LatencyTable
from fxmerge.errors import InputError
from fxmerge.solve import given
from fxmerge.solve.dominance import Ints as _Ints
from fxmerge.solve.dominance import unbeaten_of_three, unbeaten_of_two
from fxmerge.solve.layers import Places, breadth_first
from fxmerge.solve.objective import LIMIT as _LIMIT
from fxmerge.solve.objective import NANO as _NANO
from fxmerge.solve.objective import Objective, Prices, price
from fxmerge.solve.space import SpaceName, restrict
from fxmerge.solve.thinning import thinned, thinned_in_three

MAX_POINTS = 4096  # 150 units with 8 candidates each reach some 1,500 points; 1,000 with 10 each take 3 s at this bound
_TICK = 1 << 20  # 1 ns, as an integer; the bits below count merges, so that among equal plans the fewest sort first
_BLOCK = 1 << 18  # points of a sum that are laid out at once


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Trace:
    """Where the points of a front come from: ``origin`` counts through the sums of all parts, laid end to end."""

    origin: _Ints
    parts: tuple[tuple[_Trace, _Trace], ...] = ()
    candidate: int | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Front:
    """Points by rising latency and falling loss, or in lexicographic order of (latency, amount, loss).

    ``cost`` (2 or 3, points) holds ticks, nano-losses and, with a second resource, amounts.
    """

    cost: _Ints
    trace: _Trace
    slack: int = 0
    surplus: int = 0


@dataclass(frozen=True, slots=True)
class _Offer:
    """A candidate, by its index, and the number of the cut where it starts."""

    start: int
    candidate: int
    latency_ns: int
    nano_loss: int
    amount: int


@dataclass(frozen=True, slots=True)
class _Rule:
    """How fronts are added up and cut short; without a second resource there are no amounts."""

    max_points: int | None
    second: Resource | None

    @property
    def largest(self) -> bool:
        return self.second is not None and self.second.largest

    def point(self, ticks: int = 0, nano_loss: int = 0, amount: int = 0, candidate: int | None = None) -> _Front:
        rows = [[ticks], [nano_loss]] if self.second is None else [[ticks], [nano_loss], [amount]]
        return _Front(np.array(rows, dtype=np.int64), _Trace(np.zeros(1, dtype=np.int64), candidate=candidate))

    def add(self, left: _Ints, right: _Ints) -> _Ints:
        """The costs of all pairs."""
        cost = right[:, :, None] + left[:, None, :]
        if self.largest:
            np.maximum(right[2, :, None], left[2, None, :], out=cost[2])
        return cost.reshape(len(cost), -1)


def solve(
    root: Unit,
    candidates: Sequence[Candidate],
    latencies_ns: Sequence[int],
    losses: Sequence[float],
    *,
    units_ns: Mapping[str, int],
    remainder_ns: int,
    original_ns: int,
    fingerprint: str,
    objective: Objective = "additive-loss",
    units_loss: Mapping[str, float] | None = None,
    second: Resource | None = None,
    max_points: int | None = MAX_POINTS,
) -> ParetoFront:
    """Find all plans of which none is both no slower and no worse than another, nor takes less of a second resource.

    Of plans equal in latency and loss (and amount) it keeps one of fewest merges; of those, where they last differ along a
    chain, it prefers the unit left alone, then the candidate offered first. (With a resource of which the largest amount
    counts, the one kept may have more merges.)

    Args:
        root: the whole network; its children are the top-level chains.
        candidates: what is offered; each runs from a cut of some chain to a later cut of it.
        latencies_ns: of each candidate.
        losses: of each candidate.
        units_ns: unit (its ``end``) -> latency of its own nodes left alone; 0 for a unit that is missing.
        remainder_ns: added to the latency of every plan; may be negative.
        original_ns: latency of the folded original.
        fingerprint: of the graph.
        objective: what is made small, see :mod:`fxmerge.solve.objective`.
        units_loss: unit (its ``end``) -> its loss left alone, where that is measured, too; 0 for a unit that is missing.
        second: a resource that plans can be picked by beside latency.
        max_points: thin fronts that grow longer, and report in ``slack`` and ``surplus`` what that may cost; None never does.

    Raises:
        InputError: a candidate fits no chain, or a number cannot be used.

    >>> from fxmerge.core.geometry import Geometry
    >>> chain = Chain(("x", "a", "b"), (Unit("a", ("a",)), Unit("b", ("b",))))
    >>> merge = Candidate("x", "b", "b", "identity", Geometry.identity(8, 2))
    >>> front = solve(Unit("output", (), (chain,)), [merge], [5], [0.25], units_ns={"a": 10, "b": 10}, remainder_ns=1,
    ...               original_ns=21, fingerprint="")
    >>> front.latencies_ns, front.losses, front.choose(0)
    ((6, 21), (0.25, 0.0), (0,))
    """
    root, candidates, second = given.a_unit(root), given.some_candidates(candidates), given.a_resource(second)
    latencies_ns, losses = given.some(latencies_ns, "latencies_ns"), given.some(losses, "losses")
    units_loss = given.by_name({} if units_loss is None else units_loss, "units_loss")
    max_points = given.at_most(max_points, 2 if second is None else 3)
    _whole(original_ns, "original_ns")
    _size(remainder_ns, "remainder_ns")
    units = breadth_first(root)
    own_ns = _own_latencies(units, given.by_name(units_ns, "units_ns"))
    if not len(candidates) == len(latencies_ns) == len(losses):
        counts = f"{len(candidates)} candidates, {len(latencies_ns)} latencies, {len(losses)} losses"
        raise InputError(f"found {counts}; give one latency and one loss for each candidate.")
    places = Places(units)
    prices = price(objective, candidates, losses, units_loss, places, root.end)
    offers = _offers(places, candidates, latencies_ns, prices, second)
    own_amount = _own_amounts(own_ns, second)
    _check_range(own_ns, own_amount, prices, offers)
    rule = _Rule(max_points, second)

    alone: dict[str, _Front] = {}
    for unit in reversed(units):  # what is inside a unit comes before it
        front = rule.point(own_ns[unit.end] * _TICK, prices.units.get(unit.end, 0), own_amount[unit.end])
        for chain in unit.children:
            front = _best([(front, _along(chain, alone, offers, rule))], rule)
        alone[unit.end] = front

    front = alone[root.end]
    shown = (front.cost[1] - prices.base) / _NANO
    if second is None:
        shows = np.append(True, shown[1:] < shown[:-1])  # neighbours above 2**53 may round to one float
        amounts: list[int] = []
    else:
        shows = np.ones(len(shown), dtype=np.bool_)
        amounts = [max(n, second.rest) if second.largest else n + second.rest for n in front.cost[2].tolist()]
    return ParetoFront(
        fingerprint=fingerprint,
        latencies_ns=tuple(ns + remainder_ns for ns in (front.cost[0][shows] // _TICK).tolist()),
        losses=tuple(shown[shows].tolist()),
        candidates=tuple(candidates),
        original_ns=original_ns,
        choose=partial(_choose, _Trace(front.trace.origin[shows], front.trace.parts)),
        slack=front.slack / _NANO,
        objective=objective,
        second="" if second is None else second.name,
        amounts=tuple(amounts),
        surplus=front.surplus,
    )


def solve_tables(
    root: Unit,
    candidates: Sequence[Candidate],
    latency: LatencyTable,
    importance: ImportanceTable,
    fingerprint: str,
    *,
    space: SpaceName = "joint",
    objective: Objective = "additive-loss",
    second: Resource | None = None,
    max_points: int | None = MAX_POINTS,
) -> ParetoFront:
    """:func:`solve` on measured tables; candidates missing from either, or outside the space, are not offered.

    Args:
        root, candidates, fingerprint, objective, second, max_points: as for :func:`solve`.
        latency: of candidates, units left alone, and the whole.
        importance: of candidates; what is negative counts as 0 in a sum of losses.
        space: ``joint`` offers all; ``activations`` and ``layers`` are baselines, see :mod:`fxmerge.solve.space`.

    Raises:
        InputError: a candidate fits no chain, or a number or an option cannot be used.
    """
    for name, table, kind in (("latency", latency, LatencyTable), ("importance", importance, ImportanceTable)):
        if not isinstance(table, kind):
            raise InputError(f"{name} must be a table, {kind.__name__}, found {table!r:.80}")
    offered = restrict(root, candidates, space)
    known = [c for c in offered if c.id in latency.candidates and c.id in importance.candidates]
    return solve(
        root,
        known,
        [latency.candidate_ns(c.id) for c in known],
        [max(0.0, loss) if objective == "additive-loss" else loss for loss in (importance.loss(c.id) for c in known)],
        units_ns={end: latency.unit_ns(end) for end in latency.units},
        remainder_ns=latency.remainder_ns,
        original_ns=latency.network.median_ns,
        fingerprint=fingerprint,
        objective=objective,
        second=second,
        max_points=max_points,
    )


def _along(chain: Chain, alone: Mapping[str, _Front], offers: Mapping[str, Sequence[_Offer]], rule: _Rule) -> _Front:
    """The last front of a chain."""
    fronts = [rule.point()]
    for unit in chain.units:
        parts = [(fronts[-1], alone[unit.end])]
        for offer in offers.get(unit.end, ()):
            merge = rule.point(offer.latency_ns * _TICK + 1, offer.nano_loss, offer.amount, offer.candidate)
            parts.append((fronts[offer.start], merge))
        fronts.append(_best(parts, rule))
    return fronts[-1]


def _best(parts: Sequence[tuple[_Front, _Front]], rule: _Rule) -> _Front:
    """Prune the union of the sums of each two fronts, then thin it."""
    pending: list[tuple[_Ints, _Ints]] = []
    count = size = held = 0
    for left, right in parts:
        rows = max(1, _BLOCK // left.cost.shape[1])
        for row in range(0, right.cost.shape[1], rows):
            cost = rule.add(left.cost, right.cost[:, row : row + rows])
            pending.append((cost, np.arange(count, count + cost.shape[1])))
            count, size = count + cost.shape[1], size + cost.shape[1]
            if size > 2 * max(_BLOCK, held):
                pending = [_prune(pending)]
                size = held = pending[0][0].shape[1]
    cost, origin = _prune(pending)
    slack = max(left.slack + right.slack for left, right in parts)
    joined = max if rule.largest else operator.add
    surplus = max(joined(left.surplus, right.surplus) for left, right in parts)
    if rule.max_points is not None and len(origin) > rule.max_points:
        if rule.second is None:
            kept, gap = thinned(cost[1], rule.max_points)
        else:
            latency, merges = np.divmod(cost[0], _TICK)
            kept, gap, more = thinned_in_three(latency, cost[1], cost[2], merges, rule.max_points)
            surplus += more
        cost, origin, slack = cost[:, kept], origin[kept], slack + gap
    return _Front(cost, _Trace(origin, tuple((left.trace, right.trace) for left, right in parts)), slack, surplus)


def _prune(pending: Sequence[tuple[_Ints, _Ints]]) -> tuple[_Ints, _Ints]:
    """Costs and origins of the points that no other beats; of equal ones, the first of fewest merges."""
    cost = np.concatenate([cost for cost, _ in pending], axis=1)
    origin = np.concatenate([origin for _, origin in pending])
    if len(cost) == 2:
        order = unbeaten_of_two(cost[0], cost[1])
        latency = cost[0][order] // _TICK
        order = order[np.append(latency[1:] > latency[:-1], True)]  # of equal latencies the last has the least loss
    else:
        order = unbeaten_of_three(cost[0] // _TICK, cost[2], cost[1], cost[0] % _TICK)
    return cost[:, order], origin[order]


def _choose(trace: _Trace, point: int) -> tuple[int, ...]:
    """The candidates behind a point, in graph order: along the chain, and chain after chain."""
    chosen: list[int] = []
    stack = [(trace, point)]
    while stack:
        trace, point = stack.pop()
        if trace.candidate is not None:
            chosen.append(trace.candidate)
        place = int(trace.origin[point])
        for left, right in trace.parts:
            size = len(left.origin) * len(right.origin)
            if place < size:
                row, column = divmod(place, len(left.origin))
                stack += (left, column), (right, row)
                break
            place -= size
    return tuple(reversed(chosen))


def _own_latencies(units: Sequence[Unit], units_ns: Mapping[str, int]) -> dict[str, int]:
    """Unit -> latency of its own nodes."""
    own_ns = dict.fromkeys((unit.end for unit in units), 0)
    if len(own_ns) < len(units):
        twice = Counter(unit.end for unit in units).most_common(1)[0][0]
        raise InputError(f"two units end at {twice!r}; a unit is named by its end. Give each its own.")
    for end, latency_ns in units_ns.items():
        if end not in own_ns:
            raise InputError(f"units_ns names {end!r}, which ends no unit. Measure again, on this network.")
        own_ns[end] = _whole(latency_ns, f"the latency of unit {end!r}")
    return own_ns


def _own_amounts(ends: Mapping[str, int], second: Resource | None) -> dict[str, int]:
    """Unit -> what its own nodes take of the second resource."""
    amounts = dict.fromkeys(ends, 0)
    if second is None:
        return amounts
    _size(second.rest, f"the rest of {second.name}", "")
    for end, amount in second.units.items():
        if end not in amounts:
            raise InputError(f"{second.name} names {end!r}, which ends no unit. Count again, on this network.")
        amounts[end] = _whole(amount, f"{second.name} of unit {end!r}", "")
    return amounts


def _offers(
    places: Places, candidates: Sequence[Candidate], latencies_ns: Sequence[int], prices: Prices, second: Resource | None
) -> dict[str, list[_Offer]]:
    """The end of a unit -> the candidates that end there."""
    offers: dict[str, list[_Offer]] = defaultdict(list)
    for k, (candidate, latency_ns, nano) in enumerate(zip(candidates, latencies_ns, prices.candidates, strict=True)):
        name = f"candidate {candidate.id!r}"
        _, start, _ = places.stretch(candidate)
        if second is not None and candidate.id not in second.candidates:
            raise InputError(f"{second.name} of {name} is missing. Count again, with these candidates.")
        amount = 0 if second is None else _whole(second.candidates[candidate.id], f"{second.name} of {name}", "")
        offers[candidate.end].append(_Offer(start, k, _whole(latency_ns, f"the latency of {name}"), nano, amount))
    return offers


def _check_range(
    own_ns: Mapping[str, int], own_amount: Mapping[str, int], prices: Prices, offers: Mapping[str, Sequence[_Offer]]
) -> None:
    """Refuse sums of over 64 bits; at a unit a plan pays for it, or for one candidate that ends there, or nothing."""
    ticks = sum(max([own, *(o.latency_ns for o in offers.get(end, ()))]) * _TICK + 1 for end, own in own_ns.items())
    if ticks >= _LIMIT:
        raise InputError(f"the latencies add up to {ticks // _TICK} ns, over {_LIMIT // _TICK}. Give nanoseconds.")
    nano = sum(max([prices.units.get(end, 0), *(o.nano_loss for o in offers.get(end, ()))]) for end in own_ns)
    if nano >= _LIMIT:
        text = f"the losses add up to {nano / _NANO:.3e}, over {_LIMIT / _NANO:.3e}"
        raise InputError(f"{text}. Leave out the candidates that lose most.")
    amount = sum(max([own, *(o.amount for o in offers.get(end, ()))]) for end, own in own_amount.items())
    if amount >= _LIMIT:
        raise InputError(f"the amounts of the second resource add up to {amount}, over {_LIMIT}. Give them in a larger unit.")


def _size(value: int, what: str, unit: str = "nanoseconds") -> int:
    """The size of a number that may be negative."""
    return _whole(abs(value) if isinstance(value, (int, np.integer)) else value, f"the size of {what}", unit)


def _whole(value: int, what: str, unit: str = "nanoseconds") -> int:
    try:
        number = operator.index(value)
    except TypeError:
        of = f" of {unit}" if unit else ""
        raise InputError(f"{what} is {value!r:.80}; it must be a whole number{of}. Round it up.") from None
    if number < 0:
        raise InputError(f"{what} is {number}{' ns' if unit else ''}; it cannot be negative. Measure it again.")
    return number
