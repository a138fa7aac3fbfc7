"""Small random networks with tables, from a seeded generator, and all their plans, one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.plan import ParetoFront
from fxmerge.core.region import Chain, Unit
from fxmerge.core.resource import Resource
from fxmerge.core.segment import Candidate
from fxmerge.solve.frontier import solve


@dataclass(frozen=True)
class Part:
    """A candidate taken, or a unit's own nodes left alone."""

    latency_ns: int
    loss: float
    amount: int
    layers: int  # how many it stands for; 0 for the own nodes of a block
    candidate: int | None = None


@dataclass(frozen=True)
class Tree:
    root: Unit
    candidates: tuple[Candidate, ...]
    latencies_ns: tuple[int, ...]
    losses: tuple[float, ...]
    units_ns: dict[str, int]
    units_loss: dict[str, float]
    amounts: Resource
    remainder_ns: int

    def solve(self, **options: Any) -> ParetoFront:
        numbers: dict[str, Any] = {"units_ns": self.units_ns, "remainder_ns": self.remainder_ns, "original_ns": 100}
        options = {"max_points": None, "fingerprint": "f", **options}
        return solve(self.root, self.candidates, self.latencies_ns, self.losses, **numbers, **options)

    def plans(self) -> Iterator[tuple[Part, ...]]:
        """Every partition of the network into candidates and units left alone."""
        yield from self._left(self.root)

    def _left(self, unit: Unit) -> Iterator[tuple[Part, ...]]:
        inner = any(chain.units for chain in unit.children)
        own = Part(
            self.units_ns.get(unit.end, 0), self.units_loss.get(unit.end, 0.0), self.amounts.units.get(unit.end, 0), int(not inner)
        )
        for below in itertools.product(*(list(self._from(chain, 0)) for chain in unit.children)):
            yield (own, *itertools.chain.from_iterable(below))

    def _from(self, chain: Chain, at: int) -> Iterator[tuple[Part, ...]]:
        if at == len(chain.units):
            yield ()
            return
        for first in self._left(chain.units[at]):
            yield from ((*first, *rest) for rest in self._from(chain, at + 1))
        for k, candidate in enumerate(self.candidates):
            if candidate.entry == chain.cuts[at] and candidate.end in chain.cuts[at + 1 :]:
                stop = chain.cuts.index(candidate.end)
                covered = sum(layers(unit) for unit in chain.units[at:stop])
                part = Part(self.latencies_ns[k], self.losses[k], self.amounts.candidates[candidate.id], covered, k)
                yield from ((part, *rest) for rest in self._from(chain, stop))

    def latency(self, plan: tuple[Part, ...]) -> int:
        return self.remainder_ns + sum(part.latency_ns for part in plan)

    def amount(self, plan: tuple[Part, ...]) -> int:
        amounts = [part.amount for part in plan] + [self.amounts.rest]
        return max(amounts) if self.amounts.largest else sum(amounts)


def layers(unit: Unit) -> int:
    return sum(layers(inner) for chain in unit.children for inner in chain.units) or 1


def additive(plan: tuple[Part, ...]) -> float:
    return sum(part.loss for part in plan)


def less_exponentials(plan: tuple[Part, ...]) -> float:
    """The layers there are, less the sum of exp(change) over the parts that stand for layers."""
    return sum(part.layers - math.exp(-part.loss) for part in plan if part.layers)


def candidate(entry: str, end: str, number: int) -> Candidate:
    """One with an id of its own."""
    return Candidate(entry, end, end, "fitted", Geometry(8, 8, (Axis(number + 1), Axis())))


def random_tree(
    random: np.random.Generator, *, most: int = 5, kind: Literal["sum", "largest"] = "sum", signed: bool = False
) -> Tree:
    """Chains of up to 3 units; in some, up to two more of up to 2, nested twice."""
    names = (f"n{k}" for k in itertools.count())
    places: list[tuple[str, str]] = []

    def grow(entry: str, depth: int) -> Chain:
        cuts, units = [entry], []
        for _ in range(int(random.integers(1, 4 if depth == 2 else 3))):
            end = next(names)
            branches = int(random.choice([0, 0, 0, 1, 2])) if depth else 0
            units.append(Unit(end, (end,), tuple(grow(cuts[-1], depth - 1) for _ in range(branches))))
            cuts.append(end)
        places.extend(itertools.combinations(cuts, 2))
        return Chain(tuple(cuts), tuple(units))

    root = Unit("output", (), (grow("x", 2),))
    taken = [places[k] for k in random.integers(0, len(places), int(random.integers(0, most + 1)))]
    candidates = tuple(candidate(*place, number) for number, place in enumerate(taken))
    ends = [unit.end for unit in root.walk()]
    low = -2 if signed else 0
    losses = tuple((random.integers(low, 9, len(taken)) / 8).tolist())
    leaves = [unit.end for unit in root.walk() if not unit.children]
    alone = dict(zip(leaves, (random.integers(low, 3, len(leaves)) / 8).tolist(), strict=True)) if signed else {}
    amounts = Resource(
        "peak_bytes" if kind == "largest" else "parameters",
        {c.id: int(random.integers(0, 13)) for c in candidates},
        {end: int(random.integers(0, 13)) for end in ends},
        int(random.integers(0, 4)),
        kind == "largest",
    )
    return Tree(
        root,
        candidates,
        tuple(random.integers(0, 13, len(taken)).tolist()),
        losses,
        {end: int(random.integers(0, 13)) for end in ends},
        alone,
        amounts,
        int(random.integers(-5, 6)),
    )


def random_line(random: np.random.Generator, units: int, offers: int) -> Tree:
    """One chain, whose fronts grow long."""
    ends = [f"n{k}" for k in range(units)]
    cuts = ["x", *ends]
    stops = [k for k in range(1, units + 1) for _ in range(offers)]
    places = [(cuts[max(0, stop - int(random.integers(1, 3)))], cuts[stop]) for stop in stops]
    candidates = tuple(candidate(*place, number) for number, place in enumerate(places))
    return Tree(
        Unit("output", (), (Chain(tuple(cuts), tuple(Unit(end, (end,)) for end in ends)),)),
        candidates,
        tuple(random.integers(10**3, 10**5, len(places)).tolist()),
        tuple((random.integers(0, 2**9, len(places)) / 2**9).tolist()),
        dict(zip(ends, random.integers(10**4, 10**5, units).tolist(), strict=True)),
        {},
        Resource(
            "parameters",
            {c.id: int(random.integers(10**3, 10**6)) for c in candidates},
            {end: int(random.integers(10**3, 10**6)) for end in ends},
            17,
        ),
        0,
    )


def as_largest(tree: Tree) -> Tree:
    return replace(tree, amounts=replace(tree.amounts, name="peak_bytes", largest=True))
