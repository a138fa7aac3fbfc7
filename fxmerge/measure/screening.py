"""Which candidates a good plan could want, told from rough scores.

Scores on few images are off by a factor that differs from candidate to candidate. So the front is solved for a number of tables in
which every loss is multiplied by a factor of its own,

    loss * exp(sigma * z),   z standard normal,

and whatever is in a plan of any of these fronts is wanted. A candidate that no table wants would have to be better than its rough
score says by several sigma, or its rivals worse, to be in a plan. This is no proof: what it may cost is measured in
``benchmarks/tables.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxmerge.core.plan import ParetoFront
from fxmerge.core.region import Unit
from fxmerge.core.segment import Proposal
from fxmerge.core.table import ImportanceTable, LatencyTable
from fxmerge.solve.frontier import solve_tables
from fxmerge.solve.objective import Objective

SIGMA = 0.5
DRAWS = 24
_POINTS = 256  # of a front that are looked at
_MOST_LOSS = 2.0  # plans that lose more are wanted by nobody


def wanted(
    region: Unit,
    proposals: Sequence[Proposal],
    latency: LatencyTable,
    rough: ImportanceTable,
    fingerprint: str,
    objective: Objective = "additive-loss",
    *,
    sigma: float = SIGMA,
    draws: int = DRAWS,
    most_loss: float = _MOST_LOSS,
    seed: int = 0,
) -> frozenset[str]:
    """The ids of the candidates that are in a plan of some front near the rough one.

    Args:
        region: the tree of chains of the network.
        proposals: what was offered.
        latency, rough: the tables.
        fingerprint: of the graph.
        objective: what plans are ranked by.
        sigma: how far off the rough losses are, as a standard deviation of their logarithm.
        draws: tables to solve, the rough one itself among them.
        most_loss: plans of more predicted loss than this count for nothing, but for the least that a front has.
        seed: of the factors.
    """
    known = [c for p in proposals for c in p.candidates if c.id in latency.candidates and c.id in rough.candidates]
    generator = np.random.default_rng(seed)
    chosen: set[str] = set()
    for draw in range(draws):
        factors = (np.exp(sigma * generator.standard_normal(len(known))) if draw else np.ones(len(known))).tolist()
        rescaled = rough.scaled({c.id: factor for c, factor in zip(known, factors, strict=True)})
        front = solve_tables(region, known, latency, rescaled, fingerprint, objective=objective, max_points=1024)
        chosen.update(candidate.id for point in _looked_at(front, most_loss) for candidate in front.plan(point).merges)
    return frozenset(chosen)


def _looked_at(front: ParetoFront, most_loss: float) -> Sequence[int]:
    """Points evenly over the part of a front that matters."""
    losses = np.asarray(front.losses)
    first = min(int(np.argmax(losses <= most_loss)), len(losses) - 1) if bool((losses <= most_loss).any()) else len(losses) - 1
    return [int(i) for i in np.unique(np.linspace(first, len(losses) - 1, _POINTS).round().astype(int))]
