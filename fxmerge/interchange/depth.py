"""Depth compression by two-stage dynamic programming on published tables (:mod:`fxmerge.interchange.depth_files`).

Solved is

    stage 1    T_opt(st, end) = min over st = b0 < ... < bm = end of the sum of T(b, b')          (where only T is given)
    stage 2    max sum of I(st, end, a, b)  subject to  sum of T_opt(st, end) <= budget,

over rows that meet: one starts where the last one ended, with the activation that it left there; the first with 1.

As a chain: its cuts are (k, activation or none), in that order, and every row runs from one to a later one. No unit can be left
alone; each costs 1 ns and 1 of loss more than the fastest plan in all, which so beats every plan with such a unit. With m the
largest I / (end - st), or 0, the losses m (end - st) - I are from 0 on, and add up to m N less the sum of I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.region import Chain, Unit
from fxmerge.core.segment import Candidate
from fxmerge.errors import InputError
from fxmerge.solve.frontier import MAX_POINTS, solve

#: A place, and whether there is an activation.
State: TypeAlias = tuple[int, bool]


@dataclass(frozen=True, slots=True)
class Piece:
    """A row: from one state to a later one.

    Args:
        start, stop: place and activation.
        latency_ns: of its fastest pieces.
        importance: more is better.
        breaks: where those meet, both ends included.
    """

    start: State
    stop: State
    latency_ns: int
    importance: float
    breaks: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.stop[0] - self.start[0]


@dataclass(frozen=True)
class DepthTables:
    """Two tables of depth compression.

    Args:
        first, last: the places that the chain runs between.
        pieces: all that can be in a plan. Behind the last place nothing follows: of two that differ in the last activation alone
            the better is here.
        original_ns: of every convolution by itself.
    """

    first: int
    last: int
    pieces: tuple[Piece, ...]
    original_ns: int

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The pieces, single layers too; the tables say nothing of channels and kernels: all are 1x1 here, of two channels."""
        unknown = Geometry(2, 2, (Axis(), Axis()), bias=True)
        made = []
        for piece in self.pieces:
            (st, _), (end, kept) = piece.start, piece.stop
            gone = tuple(f"activation{k}" for k in range(st + 1, end if kept else end + 1))
            stop = self._name(piece.stop)
            made.append(Candidate(self._name(piece.start), stop, stop, "composed", unknown, gone))
        return tuple(made)

    def solve(self, *, max_points: int | None = MAX_POINTS) -> ParetoFront:
        """Every plan that no other beats; a plan's loss is minus the sum of its importances, its merges are all of its rows.

        Raises:
            InputError: a number is too large for the solver.
        """
        level = max([0.0, *(piece.importance / piece.length for piece in self.pieces)])
        losses = [level * piece.length - piece.importance for piece in self.pieces]
        fastest_ns, its_loss = self.fastest(losses)
        root = self._root()
        names = [unit.end for unit in root.children[0].units]
        front = solve(
            root,
            self.candidates,
            [piece.latency_ns for piece in self.pieces],
            [max(0.0, loss) for loss in losses],  # one is 0, but for rounding
            units_ns=dict.fromkeys(names, fastest_ns + 1),
            units_loss=dict.fromkeys(names, its_loss + 1.0),
            remainder_ns=0,
            original_ns=self.original_ns,
            fingerprint="",
            max_points=max_points,
        )
        shift = level * (self.last - self.first)
        return replace(front, losses=tuple(loss - shift for loss in front.losses))

    def positions(self, plan: Plan) -> tuple[frozenset[int], frozenset[int]]:
        """What their checkpoints call ``act_pos`` and ``merge_pos``: places that keep an activation, and where a convolution ends.

        Raises:
            InputError: the plan is not of these tables.
        """
        known = dict(zip((candidate.id for candidate in self.candidates), self.pieces, strict=True))
        for merge in plan.merges:
            if merge.id not in known:
                raise InputError(f"{merge.id!r} is no row of these tables; give a plan of their own front")
        taken = [known[merge.id] for merge in plan.merges]
        kept = frozenset(piece.stop[0] for piece in taken if piece.stop[1])
        return kept, frozenset(place for piece in taken for place in piece.breaks[1:])

    def _name(self, state: State) -> str:
        place, kept = state
        return f"conv{place}" if kept or place == self.last else f"conv{place} linear"

    def _states(self) -> list[State]:
        used = {state for piece in self.pieces for state in (piece.start, piece.stop)}
        between = sorted(state for state in used if self.first < state[0] < self.last)
        return [(self.first, True), *between, (self.last, True)]

    def _root(self) -> Unit:
        cuts = tuple(map(self._name, self._states()))
        return Unit("output", (), (Chain(cuts, tuple(Unit(cut, (cut,)) for cut in cuts[1:])),))

    def fastest(self, losses: Sequence[float]) -> tuple[int, float]:
        """Nanoseconds and loss of the fastest plan.

        Raises:
            InputError: there is no plan at all.
        """
        best: dict[str, tuple[int, float]] = {self._name((self.first, True)): (0, 0.0)}
        for piece, loss in sorted(zip(self.pieces, losses, strict=True), key=lambda entry: entry[0].start):
            start, stop = self._name(piece.start), self._name(piece.stop)
            if start in best:
                reached = best[start][0] + piece.latency_ns, best[start][1] + loss
                best[stop] = min(best.get(stop, reached), reached)
        end = self._name((self.last, True))
        if end not in best:
            raise InputError(f"no rows lead from place {self.first} to {self.last}: the activations where they meet do not agree")
        return best[end]
