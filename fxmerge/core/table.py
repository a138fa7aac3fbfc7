"""Measurements with their provenance, and the two tables that the solver reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fxmerge.core.geometry import whole
from fxmerge.errors import PlanError


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how a network will run; a latency means nothing without it.

    Args:
        device: ``cpu`` or ``cuda``, with an index if need be.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        channels_last: whether images and weights lie in memory with the channels last.
        backend: ``eager``, or a back end that ``torch.compile`` knows, such as ``inductor``.
        threads: CPU threads; 0 is torch's own setting.
    """

    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool = False
    backend: str = "eager"
    threads: int = 0

    def __str__(self) -> str:
        layout = "channels-last" if self.channels_last else "contiguous"
        threads = f", {self.threads} threads" if self.threads else ""
        return f"{self.device} {self.dtype} {layout} {self.backend}{threads}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """A latency with what is needed to judge it.

    Args:
        median_ns: median over the repeats, nanoseconds, rounded up.
        spread_ns: distance between the quartiles, nanoseconds.
        repeats: how many timings the median is of.
        target: where and how it ran.
        versions: of python, torch and the processor or GPU.
    """

    median_ns: int
    spread_ns: int
    repeats: int
    target: Target
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A value that ``json`` can write and :meth:`from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: it is not such a value.
        """
        try:
            return cls(
                whole(data["median_ns"]),
                whole(data["spread_ns"]),
                whole(data["repeats"]),
                Target(**data["target"]),
                dict(data["versions"]),
            )
        except (KeyError, TypeError, ValueError) as fault:
            raise PlanError(f"not a measurement: {fault!r} in {data!r}") from fault


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """What every candidate and every unit left alone costs.

    Equal modules at equal shapes are measured once, so candidates and units hold the key of a measurement, not a measurement.

    Args:
        measurements: by key, which says what was timed.
        candidates: candidate id -> key.
        units: unit (its ``end``) -> key of its own nodes as they are; units that cannot change are missing.
        network: the whole folded original, end to end.
    """

    measurements: Mapping[str, Measurement]
    candidates: Mapping[str, str]
    units: Mapping[str, str]
    network: Measurement

    def candidate_ns(self, candidate_id: str) -> int:
        """Latency of a candidate in nanoseconds; KeyError if it was not measured."""
        return self.measurements[self.candidates[candidate_id]].median_ns

    def unit_ns(self, end: str) -> int:
        """Latency of a unit's own nodes, left alone, in nanoseconds; 0 for one that no candidate touches."""
        return self.measurements[self.units[end]].median_ns if end in self.units else 0

    @property
    def remainder_ns(self) -> int:
        """What of the network's latency is in no entry; may be negative where layers run faster together than alone."""
        return self.network.median_ns - sum(self.unit_ns(end) for end in self.units)


@dataclass(frozen=True, slots=True)
class Importance:
    """What a candidate costs in quality.

    Args:
        loss: how much worse the network gets when this segment alone is replaced; 0 is unharmed, never negative.
        samples: how many images it was measured on.
        scorer: how it was measured.
    """

    loss: float
    samples: int
    scorer: Literal["reconstruction", "exact"] | str


@dataclass(frozen=True, slots=True)
class ImportanceTable:
    """Candidate id -> importance."""

    candidates: Mapping[str, Importance]

    def loss(self, candidate_id: str) -> float:
        """The loss of a candidate; KeyError if it was not measured."""
        return self.candidates[candidate_id].loss
