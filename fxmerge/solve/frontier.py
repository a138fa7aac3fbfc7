"""Every plan that no other plan beats, for every budget at once.

Bellman's recurrence over the cuts 0..n of a chain, as in LayerMerge (Kim, El Halabi, Ji, Song; ICML 2024,
arXiv 2406.12837), but on whole fronts of (latency, loss), where LayerMerge fills a grid over time::

    front[0] = {(0, 0)}
    front[j] = prune(front[j-1] + leave(unit j)  |  union over i < j of front[i] + candidates(i, j))
    leave(unit) = the unit's own latency + the sum of the last fronts of its child chains

``+`` is the Minkowski sum. A candidate from cut i to cut j replaces all between them, children included. The network
is the root unit, left alone. Only the loss of a candidate is rounded, once, up to a whole number of 1e-9, so that all
sums are of integers.

Slack. Say that F covers P within s if each p in P has an f in F with latency(f) <= latency(p) and
loss(f) <= loss(p) + s. Let F cover P within s, and G cover Q within t. Then F | G covers P | Q within max(s, t);
F + G covers P + Q within s + t (add the inequalities); prune(F) covers P within s (beating is transitive); and a
thinned F, which has for each f in F a point no slower and at most g worse, covers P within s + g. There are no other
steps, so the slack they add up to holds for the result: at no budget is the exact front better by more. Thinning only
leaves points out, so those that stay are real plans. It keeps the fastest and the one of least loss, and so do sums,
unions and prune: the two ends of a front are always exact.
"""

from __future__ import annotations

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fxmerge.core.plan import ParetoFront
from fxmerge.core.region import Chain, Unit
from fxmerge.core.segment import Candidate
from fxmerge.core.table import ImportanceTable, LatencyTable
from fxmerge.errors import InputError

MAX_POINTS = 4096  # 150 units with 8 candidates each reach some 1,500 points; 1,000 with 10 each take 3 s at this bound
_NANO = 1_000_000_000  # a loss of 1, as an integer
_TICK = 1 << 20  # 1 ns, as an integer; the bits below count merges, so that among equal plans the fewest sort first
_LIMIT = 1 << 63
_BLOCK = 1 << 18  # points of a sum that are laid out at once

_Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Trace:
    """Where the points of a front come from: ``origin`` counts through the sums of all parts, laid end to end."""

    origin: _Ints
    parts: tuple[tuple[_Trace, _Trace], ...] = ()
    candidate: int | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Front:
    """Points by rising latency and falling loss; ``cost`` (2, points) holds ticks and nano-losses."""

    cost: _Ints
    trace: _Trace
    slack: int = 0


@dataclass(frozen=True, slots=True)
class _Offer:
    """A candidate, by its index, and the number of the cut where it starts."""

    start: int
    candidate: int
    latency_ns: int
    nano_loss: int


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
    max_points: int | None = MAX_POINTS,
) -> ParetoFront:
    """Find all plans of which none is both no slower and no worse than another.

    Of plans equal in latency and loss it keeps one of fewest merges; of those, where they last differ along a chain, it
    prefers the unit left alone, then the candidate offered first.

    Args:
        root: the whole network; its children are the top-level chains.
        candidates: what is offered; each runs from a cut of some chain to a later cut of it.
        latencies_ns: of each candidate.
        losses: of each candidate.
        units_ns: unit (its ``end``) -> latency of its own nodes left alone; 0 for a unit that is missing.
        remainder_ns: added to the latency of every plan; may be negative.
        original_ns: latency of the folded original.
        fingerprint: of the graph.
        max_points: thin fronts that grow longer, and report in ``slack`` what that may cost; None never does.

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
    if max_points is not None and max_points < 2:
        raise InputError(f"max_points is {max_points}; a front needs 2 to keep its ends. Give 2 or more, or None.")
    _whole(original_ns, "original_ns")
    _whole(abs(remainder_ns), "the size of remainder_ns")
    units = _breadth_first(root)
    own_ns = _own_latencies(units, units_ns)
    offers = _offers(units, candidates, latencies_ns, losses)
    _check_range(own_ns, offers)

    alone: dict[str, _Front] = {}
    for unit in reversed(units):  # what is inside a unit comes before it
        front = _point(own_ns[unit.end] * _TICK)
        for chain in unit.children:
            front = _best([(front, _along(chain, alone, offers, max_points))], max_points)
        alone[unit.end] = front

    front = alone[root.end]
    shown = front.cost[1] / _NANO
    falls = np.append(True, shown[1:] < shown[:-1])  # neighbours above 2**53 may round to one float
    return ParetoFront(
        fingerprint=fingerprint,
        latencies_ns=tuple(ns + remainder_ns for ns in (front.cost[0][falls] // _TICK).tolist()),
        losses=tuple(shown[falls].tolist()),
        candidates=tuple(candidates),
        original_ns=original_ns,
        choose=partial(_choose, _Trace(front.trace.origin[falls], front.trace.parts)),
        slack=front.slack / _NANO,
    )


def solve_tables(
    root: Unit,
    candidates: Sequence[Candidate],
    latency: LatencyTable,
    importance: ImportanceTable,
    fingerprint: str,
    *,
    max_points: int | None = MAX_POINTS,
) -> ParetoFront:
    """:func:`solve` on measured tables; candidates missing from either are not offered."""
    known = [c for c in candidates if c.id in latency.candidates and c.id in importance.candidates]
    return solve(
        root,
        known,
        [latency.candidate_ns(c.id) for c in known],
        [importance.loss(c.id) for c in known],
        units_ns={end: latency.unit_ns(end) for end in latency.units},
        remainder_ns=latency.remainder_ns,
        original_ns=latency.network.median_ns,
        fingerprint=fingerprint,
        max_points=max_points,
    )


def _along(chain: Chain, alone: Mapping[str, _Front], offers: Mapping[str, Sequence[_Offer]], max_points: int | None) -> _Front:
    """The last front of a chain."""
    fronts = [_point()]
    for unit in chain.units:
        parts = [(fronts[-1], alone[unit.end])]
        for offer in offers.get(unit.end, ()):
            merge = _point(offer.latency_ns * _TICK + 1, offer.nano_loss, offer.candidate)
            parts.append((fronts[offer.start], merge))
        fronts.append(_best(parts, max_points))
    return fronts[-1]


def _point(ticks: int = 0, nano_loss: int = 0, candidate: int | None = None) -> _Front:
    cost = np.array([[ticks], [nano_loss]], dtype=np.int64)
    return _Front(cost, _Trace(np.zeros(1, dtype=np.int64), candidate=candidate))


def _best(parts: Sequence[tuple[_Front, _Front]], max_points: int | None) -> _Front:
    """Prune the union of the sums of each two fronts, then thin it."""
    pending: list[tuple[_Ints, _Ints]] = []
    count = size = held = 0
    for left, right in parts:
        rows = max(1, _BLOCK // left.cost.shape[1])
        for row in range(0, right.cost.shape[1], rows):
            cost = (right.cost[:, row : row + rows, None] + left.cost[:, None, :]).reshape(2, -1)
            pending.append((cost, np.arange(count, count + cost.shape[1])))
            count, size = count + cost.shape[1], size + cost.shape[1]
            if size > 2 * max(_BLOCK, held):
                pending = [_prune(pending)]
                size = held = pending[0][0].shape[1]
    cost, origin = _prune(pending)
    slack = max(left.slack + right.slack for left, right in parts)
    if max_points is not None and len(origin) > max_points:
        kept, gap = _thin(cost[1], max_points)
        cost, origin, slack = cost[:, kept], origin[kept], slack + gap
    return _Front(cost, _Trace(origin, tuple((left.trace, right.trace) for left, right in parts)), slack)


def _prune(pending: Sequence[tuple[_Ints, _Ints]]) -> tuple[_Ints, _Ints]:
    """Costs and origins of the points that no other beats; of equal ones, the first of fewest merges."""
    cost = np.concatenate([cost for cost, _ in pending], axis=1)
    order = np.argsort(cost[0], kind="stable")  # timsort: fast on parts that are sorted already
    least = np.minimum.accumulate(cost[1][order])
    order = order[np.append(True, least[1:] < least[:-1])]
    latency = cost[0][order] // _TICK
    order = order[np.append(latency[1:] > latency[:-1], True)]  # of equal latencies the last has the least loss
    return cost[:, order], np.concatenate([origin for _, origin in pending])[order]


def _thin(loss: _Ints, max_points: int) -> tuple[_Ints, int]:
    """Of a front too long, the points to keep, and how much worse than a dropped one its stand-in is at most.

    The range of losses is cut into equal buckets, as narrow as the number allows; the fastest of each bucket stands in
    for the rest of it. The point of least loss stays as well.
    """
    depth = loss[0] - loss

    def opens(width: int) -> npt.NDArray[np.bool_]:
        bucket = depth // width
        return np.append(True, bucket[1:] > bucket[:-1])

    narrow, wide = 0, int(depth[-1]) // (max_points - 1) + 1  # so wide, there are max_points - 1 at most
    while wide - narrow > max(1, wide >> 4):
        width = (narrow + wide) // 2
        narrow, wide = (narrow, width) if np.count_nonzero(opens(width)) < max_points else (width, wide)
    kept = opens(wide)
    stand_in = np.maximum.accumulate(np.where(kept, np.arange(len(loss)), 0))
    kept[-1] = True
    return np.flatnonzero(kept), int((loss[stand_in] - loss)[~kept].max())


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


def _breadth_first(root: Unit) -> list[Unit]:
    """All units, each before those inside it; without recursion, so of any depth."""
    units = [root]
    for unit in units:
        units.extend(inner for chain in unit.children for inner in chain.units)
    return units


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


def _offers(
    units: Sequence[Unit], candidates: Sequence[Candidate], latencies_ns: Sequence[int], losses: Sequence[float]
) -> dict[str, list[_Offer]]:
    """The end of a unit -> the candidates that end there."""
    if not len(candidates) == len(latencies_ns) == len(losses):
        counts = f"{len(candidates)} candidates, {len(latencies_ns)} latencies, {len(losses)} losses"
        raise InputError(f"found {counts}; give one latency and one loss for each candidate.")
    chains = [(chain, {cut: k for k, cut in enumerate(chain.cuts)}) for unit in units for chain in unit.children]
    places = {unit.end: place for chain, place in chains for unit in chain.units}
    offers: dict[str, list[_Offer]] = defaultdict(list)
    for k, (candidate, latency_ns, loss) in enumerate(zip(candidates, latencies_ns, losses, strict=True)):
        name = f"candidate {candidate.id!r}"
        place = places.get(candidate.end, {})
        if candidate.entry not in place or place[candidate.entry] >= place[candidate.end]:
            where = f"{candidate.entry!r} to {candidate.end!r}"
            raise InputError(f"{name}: no chain runs from {where}. Offer candidates of this network only.")
        if not 0 <= loss < _LIMIT // _NANO:
            limit = f"a finite number from 0 to {_LIMIT // _NANO:.1e}"
            raise InputError(f"the loss of {name} is {loss}; it must be {limit}. Score it again, or leave it out.")
        nanoseconds = _whole(latency_ns, f"the latency of {name}")
        offers[candidate.end].append(_Offer(place[candidate.entry], k, nanoseconds, math.ceil(float(loss) * _NANO)))
    return offers


def _check_range(own_ns: Mapping[str, int], offers: Mapping[str, Sequence[_Offer]]) -> None:
    """Refuse sums of over 64 bits; at a unit a plan pays for it, or for one candidate that ends there, or nothing."""
    ticks = sum(max([own, *(o.latency_ns for o in offers.get(end, ()))]) * _TICK + 1 for end, own in own_ns.items())
    if ticks >= _LIMIT:
        raise InputError(f"the latencies add up to {ticks // _TICK} ns, over {_LIMIT // _TICK}. Give nanoseconds.")
    nano = sum(max(offer.nano_loss for offer in offered) for offered in offers.values())
    if nano >= _LIMIT:
        text = f"the losses add up to {nano / _NANO:.3e}, over {_LIMIT / _NANO:.3e}"
        raise InputError(f"{text}. Leave out the candidates that lose most.")


def _whole(value: int, what: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{what} is {value!r}; it must be a whole number of nanoseconds. Round it up.") from None
    if number < 0:
        raise InputError(f"{what} is {number} ns; it cannot be negative. Measure it again.")
    return number
