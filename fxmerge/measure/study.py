"""What the solver needs of a network, and what was measured of its plans: values that go into a store and come back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.region import Unit
from fxmerge.core.segment import Candidate
from fxmerge.core.table import ImportanceTable, LatencyTable, Measurement
from fxmerge.errors import PlanError
from fxmerge.solve.frontier import solve_tables
from fxmerge.solve.objective import Objective
from fxmerge.solve.space import SpaceName

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Subject:
    """What an importance belongs to beside its candidate.

    Args:
        network: digest of the graph and its weights.
        data: digest of the calibration data.
        scorer: the scorer with its settings, as text.
    """

    network: str
    data: str
    scorer: str

    @property
    def digest(self) -> str:
        return digest(asdict(self))


@dataclass(frozen=True, slots=True)
class Study:
    """All that the solver needs of one network on one target, so that plans can be made without the network at hand.

    Args:
        name: what the network was called; for people.
        fingerprint: of its graph.
        region: its tree of chains.
        candidates: what was offered, in order.
        latency, importance: the tables.
    """

    name: str
    fingerprint: str
    region: Unit
    candidates: tuple[Candidate, ...]
    latency: LatencyTable
    importance: ImportanceTable

    def front(self, *, space: SpaceName = "joint", objective: Objective = "additive-loss") -> ParetoFront:
        """Every plan that no other beats; see :func:`fxmerge.solve`."""
        tables = (self.region, self.candidates, self.latency, self.importance, self.fingerprint)
        return solve_tables(*tables, space=space, objective=objective)

    def to_json(self) -> dict[str, Any]:
        """A value that ``json`` can write and :meth:`from_json` reads back; the name is kept apart."""
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "region": self.region.to_json(),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "latency": self.latency.to_json(),
            "importance": self.importance.to_json(),
        }

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> Study:
        """Read what :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is no such value.
        """
        if data["format"] != FORMAT:
            raise PlanError(f"its format is {data['format']!r:.40}")
        latency, importance = LatencyTable.from_json(data["latency"]), ImportanceTable.from_json(data["importance"])
        candidates = tuple(Candidate.from_json(candidate) for candidate in data["candidates"])
        _timed(latency.network)
        return cls(name, str(data["fingerprint"]), Unit.from_json(data["region"]), candidates, latency, importance)


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan of a study that was built and timed, end to end.

    Args:
        plan: with its predicted latency, loss and objective.
        original: the folded original, timed in turn with
        merged: the merged network.
    """

    plan: Plan
    original: Measurement
    merged: Measurement

    def to_json(self) -> dict[str, Any]:
        """A value that ``json`` can write and :meth:`from_json` reads back."""
        return {"plan": self.plan.to_json(), "original": self.original.to_json(), "merged": self.merged.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Read what :meth:`to_json` wrote; raises as :meth:`Study.from_json` does."""
        original, merged = (_timed(Measurement.from_json(data[name])) for name in ("original", "merged"))
        return cls(Plan.from_json(data["plan"]), original, merged)


def digest(value: object) -> str:
    """A short name for a value that ``json`` can write: equal values, equal names, in every process."""
    return hashlib.sha256(text_of(value).encode()).hexdigest()[:32]


def text_of(value: object) -> str:
    """JSON, the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _timed(network: Measurement) -> Measurement:
    """The measurement of a whole network, that others are divided by."""
    if network.median_ns < 1:
        raise ValueError(f"the latency of a whole network is {network.median_ns} ns, expected 1 or more")
    return network
