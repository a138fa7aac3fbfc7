r"""What plans lose when they are fitted whole, told from the losses of their merges alone and from the plans fitted so far.

A candidate is scored alone, with nothing fitted behind it. In a plan, the layers behind it make up for some of that loss, for more
of it where the loss is large and the merge early; how much, only plans that were fitted tell. So every candidate's loss is taken
to be off by a factor exp(g), and a plan P to lose

    L(P) = sum over c in P of  loss_c exp(g_c),

where g is Gaussian: one part that all share, one for each kind (composed, fitted, identity), one that grows with the logarithm of
the loss, one for each stretch of the network, and one of the candidate's own. From the plans seen, g is inferred by the usual
formulas, linearised about what is known so far: log L(P) moves with g_c by the share that c has in the sum.

A table is *drawn* from what is known then (Thompson sampling; Russo et al., arXiv 1707.02038), the front of it solved, and the
plan that it asks for fitted next: what may well be best is looked at, what is known to be worse is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate
from fxmerge.core.table import ImportanceTable

_Floats: TypeAlias = npt.NDArray[np.float64]

#: Standard deviations of the parts of g: of all, of a kind, for a factor of e of the loss, of a stretch, of one candidate.
_ALL, _KIND, _SLOPE, _STRETCH, _OWN = 2.0, 1.0, 0.3, 0.4, 0.3
#: What a factor of e of the loss does to g, before any plan was seen: of a large loss, the layers behind make up for more.
_LESS = -0.4
#: ... and of the logarithm of a plan's loss: what merges do to each other, and chance.
_NOISE = 0.1
_ROUNDS = 5
_TINY = 1e-12


@dataclass
class Belief:
    """What is known of the factors.

    Args:
        candidates: all that are offered.
        importance: their losses, each alone; one below 0, which chance made, counts for what it is above 0.
    """

    candidates: Sequence[Candidate]
    importance: ImportanceTable
    seen: list[tuple[int, ...]] = field(init=False, default_factory=list)
    lost: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.candidates = [c for c in self.candidates if c.id in self.importance.candidates]
        self.index = {c.id: number for number, c in enumerate(self.candidates)}
        self.losses: _Floats = np.array([max(_TINY, abs(self.importance.loss(c.id))) for c in self.candidates])
        logs = np.log(self.losses)
        self.kinds = _numbered([c.kind for c in self.candidates])
        self.stretches = _numbered([(c.entry, c.exit, c.end) for c in self.candidates])
        inexact = np.array([not c.exact for c in self.candidates], dtype=bool)
        self.slope: _Floats = np.where(inexact, logs - (np.median(logs[inexact]) if inexact.any() else 0.0), 0.0)

    def observe(self, plan: Plan, loss: float) -> None:
        """A plan was fitted whole, and loses this much."""
        self.seen.append(tuple(self.index[merge.id] for merge in plan.merges))
        self.lost.append(math.log(max(_TINY, loss)))

    def table(self, generator: np.random.Generator | None = None) -> ImportanceTable:
        """Losses that are drawn from what is known; or, without a generator, the most likely ones."""
        plans = len(self.seen)
        drawn = _LESS * self.slope if generator is None else self._drawn(generator)
        noise = np.zeros(plans) if generator is None else _NOISE * generator.standard_normal(plans)
        factors = drawn
        for _ in range(_ROUNDS if plans else 0):
            weights, predicted = self._linearised(factors)
            # log L(P) of any g near these factors; what the draw gives there, and what was seen instead
            left = np.array(self.lost) - (predicted + weights @ (drawn - factors)) - noise
            covered = self._covariance(weights)
            system = weights @ covered + _NOISE**2 * np.eye(plans)
            factors = np.clip(drawn + covered @ np.linalg.solve(system, left), -30.0, 30.0)
        scales = zip(self.candidates, np.exp(factors).tolist(), strict=True)
        return self.importance.scaled({c.id: math.copysign(scale, self.importance.loss(c.id)) for c, scale in scales})

    def _drawn(self, generator: np.random.Generator) -> _Floats:
        """The factors' logarithms, before anything was seen."""
        normal = generator.standard_normal
        kinds, stretches = normal(1 + int(self.kinds.max(initial=0))), normal(1 + int(self.stretches.max(initial=0)))
        shared: _Floats = _ALL * normal() + (_LESS + _SLOPE * normal()) * self.slope
        own: _Floats = _KIND * kinds[self.kinds] + _STRETCH * stretches[self.stretches] + _OWN * normal(len(self.candidates))
        return shared + own

    def _linearised(self, factors: _Floats) -> tuple[_Floats, _Floats]:
        """(plans, candidates): the share that each candidate has in the loss of each plan; and the logarithms of those losses."""
        weights = np.zeros((len(self.seen), len(self.candidates)))
        for row, merges in zip(weights, self.seen, strict=True):
            for merge in merges:
                row[merge] = self.losses[merge] * math.exp(factors[merge])
        sums = weights.sum(1)
        return weights / sums[:, None], np.log(sums)

    def _covariance(self, weights: _Floats) -> _Floats:
        """(candidates, plans): how the factors go with the logarithms of the losses of plans."""
        of_kind, of_stretch = (_summed(weights, numbers) for numbers in (self.kinds, self.stretches))
        shared: _Floats = _ALL**2 * weights.sum(1)[None] + _SLOPE**2 * np.outer(self.slope, weights @ self.slope)
        own: _Floats = _KIND**2 * of_kind + _STRETCH**2 * of_stretch + _OWN**2 * weights.T
        return shared + own


def _numbered(names: Sequence[Any]) -> npt.NDArray[np.int64]:
    numbers: Mapping[Any, int] = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int64)


def _summed(weights: _Floats, numbers: npt.NDArray[np.int64]) -> _Floats:
    """(candidates, plans): the weights of all candidates of the same number together."""
    totals = np.zeros((1 + int(numbers.max(initial=0)), len(weights)))
    np.add.at(totals, numbers, weights.T)
    found: _Floats = totals[numbers]
    return found
