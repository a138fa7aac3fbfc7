"""Measurements with their provenance, and the two tables that the solver reads."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from fxmerge.core.files import read_json, write_csv, write_json
from fxmerge.core.geometry import whole
from fxmerge.errors import InputError, PlanError

FORMAT = 1
_AGAIN = "Measure again, or take the table from where it was made."


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
            raise PlanError(f"not a measurement: {fault!r} in {data!r:.200}") from fault


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """What every candidate and every unit left alone costs.

    Equal modules at equal shapes are measured once, so candidates and units hold the key of a measurement, not a measurement.

    Parts timed alone do not add up to the whole. Where units were timed inside of the running network, too, those times count,
    brought to the whole's, and a candidate counts for its own time times the pace of the units that it replaces: how much faster
    they are inside than alone (:mod:`fxmerge.measure.inside`). Otherwise, where the whole takes longer than its parts, the rest is
    time between the parts, a constant; where it is faster, every part counts for its own time times ``pace`` = whole / sum of the
    units. Eight plans of mobilenet_v2 (batch 8, 224 pixels) came out 2.2 % off so on average, 3.5 % at most, 5.6 and 11 % by one
    pace.

    Args:
        measurements: by key, which says what was timed.
        candidates: candidate id -> key.
        units: unit (its ``end``) -> key of its own nodes as they are.
        network: the whole folded original, end to end.
        inside: unit (its ``end``) -> key of its own nodes inside of the running network; of all units, or of none.
        replaces: candidate id -> the units (their ends) that it stands for.
        pace: see above; at most 1.

    Raises:
        InputError: a candidate or a unit has a key without a measurement.
    """

    measurements: Mapping[str, Measurement]
    candidates: Mapping[str, str]
    units: Mapping[str, str]
    network: Measurement
    inside: Mapping[str, str] = field(default_factory=dict)
    replaces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pace: float = field(init=False, repr=False, compare=False)
    _share: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, key in (*self.candidates.items(), *self.units.items(), *self.inside.items()):
            if key not in self.measurements:
                raise InputError(f"{name!r} has no measurement, its key is {key!r}; give one under that key")
        alone = sum(self.measurements[key].median_ns for key in self.units.values())
        together = sum(self.measurements[key].median_ns for key in self.inside.values())
        object.__setattr__(self, "pace", min(1.0, self.network.median_ns / max(1, alone)))
        object.__setattr__(self, "_share", self.network.median_ns / together if together else 0.0)

    def candidate_ns(self, candidate_id: str) -> int:
        """Latency of a candidate in the network, in nanoseconds; KeyError if it was not measured."""
        ends = [end for end in self.replaces.get(candidate_id, ()) if end in self.units]
        alone = sum(self.measurements[self.units[end]].median_ns for end in ends)
        within = sum(self._inside_ns(end) for end in ends)
        pace = within / alone if alone and within else self.pace
        return math.ceil(self.measurements[self.candidates[candidate_id]].median_ns * pace)

    def unit_ns(self, end: str) -> int:
        """Latency of a unit's own nodes, left alone in the network, in nanoseconds; 0 for one that computes nothing."""
        if end not in self.units:
            return 0
        return math.ceil(self._inside_ns(end) if self._share else self.measurements[self.units[end]].median_ns * self.pace)

    def _inside_ns(self, end: str) -> float:
        return self.measurements[self.inside[end]].median_ns * self._share if end in self.inside else 0.0

    @property
    def remainder_ns(self) -> int:
        """What of the network's latency is in no entry; negative by a few nanoseconds of rounding where there is none."""
        return self.network.median_ns - sum(self.unit_ns(end) for end in self.units)

    def to_json(self) -> dict[str, Any]:
        """A value that ``json`` can write and :meth:`from_json` reads back."""
        return {
            "format": FORMAT,
            "measurements": {key: measured.to_json() for key, measured in self.measurements.items()},
            "candidates": dict(self.candidates),
            "units": dict(self.units),
            "network": self.network.to_json(),
            "inside": dict(self.inside),
            "replaces": {name: list(ends) for name, ends in self.replaces.items()},
        }

    @classmethod
    def from_json(cls, data: object) -> LatencyTable:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: it is not such a value, of another format, or an entry has no measurement.
        """
        data = _checked(data, "a latency table", ("measurements", "candidates", "units", "network"))
        measurements = {key: Measurement.from_json(value) for key, value in _named(data["measurements"]).items()}
        candidates, units = _named(data["candidates"]), _named(data["units"])
        inside = _named(data.get("inside", {}))
        for name, key in (*candidates.items(), *units.items(), *inside.items()):
            if not isinstance(key, str) or key not in measurements:
                raise PlanError(f"not a latency table: {name!r} has no measurement, its key is {key!r}")
        replaces = {name: _ends(name, ends) for name, ends in _named(data.get("replaces", {})).items()}
        return cls(measurements, candidates, units, Measurement.from_json(data["network"]), inside, replaces)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table written by :meth:`save`.

        Raises:
            PlanError: the file is damaged, or no latency table.
            OSError: it cannot be read.
        """
        return read_json(path, cls.from_json, _AGAIN)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line for the whole, for every unit and for every candidate: for other programs; JSON is what is read back.

        ``median_ns`` and ``spread_ns`` are as measured, ``in_network_ns`` is what the solver takes: see ``pace``.
        """
        entries = [("network", "", self.network, self.network.median_ns)]
        entries += [("unit", end, self.measurements[key], self.unit_ns(end)) for end, key in self.units.items()]
        entries += [("candidate", name, self.measurements[key], self.candidate_ns(name)) for name, key in self.candidates.items()]
        target = ("device", "dtype", "channels_last", "backend", "threads")
        rows = (
            (what, name, m.median_ns, m.spread_ns, m.repeats, nanoseconds, *(getattr(m.target, t) for t in target))
            for what, name, m, nanoseconds in entries
        )
        write_csv(path, ("what", "name", "median_ns", "spread_ns", "repeats", "in_network_ns", *target), rows)


@dataclass(frozen=True, slots=True)
class Importance:
    """What a candidate costs in quality.

    Args:
        loss: how much worse the network gets when this segment alone is replaced; 0 is unharmed, negative is better.
        samples: how many images it was measured on.
        scorer: how it was measured.
    """

    loss: float
    samples: int
    scorer: Literal["reconstruction", "exact"] | str


def bounded(loss: float) -> float:
    """A loss that an importance can hold: what overflows is as bad as can be; finite, for the solver's sums to be exact.

    >>> bounded(float("nan")), bounded(-0.5)
    (1000000.0, -0.5)
    """
    return max(-1e6, min(loss, 1e6)) if loss == loss else 1e6


@dataclass(frozen=True, slots=True)
class ImportanceTable:
    """Candidate id -> importance."""

    candidates: Mapping[str, Importance]

    def loss(self, candidate_id: str) -> float:
        """The loss of a candidate; KeyError if it was not measured."""
        return self.candidates[candidate_id].loss

    def scaled(self, factors: Mapping[str, float]) -> ImportanceTable:
        """The candidates named, the loss of each multiplied by its factor, and bounded."""
        known = {name: self.candidates[name] for name in factors}
        return ImportanceTable({name: replace(one, loss=bounded(one.loss * factors[name])) for name, one in known.items()})

    def to_json(self) -> dict[str, Any]:
        """A value that ``json`` can write and :meth:`from_json` reads back."""
        return {"format": FORMAT, "candidates": {name: asdict(found) for name, found in self.candidates.items()}}

    @classmethod
    def from_json(cls, data: object) -> ImportanceTable:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: it is not such a value, or of another format.
        """
        data = _checked(data, "an importance table", ("candidates",))
        return cls({name: _importance(name, found) for name, found in _named(data["candidates"]).items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImportanceTable:
        """Read a table written by :meth:`save`.

        Raises:
            PlanError: the file is damaged, or no importance table.
            OSError: it cannot be read.
        """
        return read_json(path, cls.from_json, _AGAIN)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line for every candidate: for other programs; JSON is what is read back."""
        rows = ((name, repr(float(found.loss)), found.samples, found.scorer) for name, found in self.candidates.items())
        write_csv(path, ("candidate", "loss", "samples", "scorer"), rows)


def _checked(data: object, what: str, parts: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise PlanError(f"not {what}: expected an object, found {type(data).__name__}")
    if data.get("format") != FORMAT:
        raise PlanError(f"not {what} of format {FORMAT}: its format is {data.get('format')!r:.40}")
    missing = [part for part in parts if part not in data]
    if missing:
        raise PlanError(f"not {what}: {missing[0]!r} is missing")
    return data


def _named(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise PlanError(f"not a table: expected an object of entries by name, found {type(value).__name__}")
    return dict(value)


def _ends(name: str, data: object) -> tuple[str, ...]:
    if not isinstance(data, list) or not all(isinstance(end, str) for end in data):
        raise PlanError(f"not a latency table: {name!r} replaces {data!r:.80}, expected a list of units")
    return tuple(data)


def _importance(name: str, data: object) -> Importance:
    try:
        loss, samples, scorer = (data[part] for part in ("loss", "samples", "scorer"))  # type: ignore[index]
        if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not math.isfinite(loss):
            raise ValueError(f"the loss is {loss!r:.80}")
        if not isinstance(scorer, str):
            raise ValueError("the scorer is no string")
        return Importance(float(loss), whole(samples), scorer)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as fault:
        raise PlanError(f"not an importance table: {fault!r} in the entry {name!r}") from fault
