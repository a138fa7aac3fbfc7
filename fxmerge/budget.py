"""What may remain of a network's latency, as people say it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fxmerge.errors import InputError


@dataclass(frozen=True, slots=True)
class Budget:
    """The latency that may remain: a fraction of the folded original's, or so many milliseconds."""

    fraction: float | None = None
    latency_ms: float | None = None

    @classmethod
    def asked(cls, speedup: float | None, fraction: float | None, latency_ms: float | None) -> Budget:
        """The budget that is given one way or another; InputError as :func:`asked_fraction`."""
        return cls(asked_fraction(speedup, fraction, latency_ms), latency_ms)

    def of_ns(self, original_ns: float) -> float:
        """In nanoseconds, where the folded original takes so long.

        >>> Budget(fraction=0.5).of_ns(30.0), Budget(latency_ms=2.0).of_ns(30.0)
        (15.0, 2000000.0)
        """
        return original_ns * self.fraction if self.fraction is not None else (self.latency_ms or 0.0) * 1e6

    def share(self, original_ns: int, ns: int) -> float:
        """How much of it a network takes that runs in ``ns``, beside a folded original of ``original_ns``; 1 is all, and above 0.

        >>> Budget(fraction=0.5).share(40, 15), Budget(latency_ms=2.0).share(40, 3000000)
        (0.75, 1.5)
        """
        return max(1, ns) / self.of_ns(original_ns)


def asked_fraction(speedup: float | None, fraction: float | None, latency_ms: float | None) -> float | None:
    """The budget as a fraction of the folded original's latency; None where it is absolute.

    Raises:
        InputError: not exactly one is given, or it is out of range.
    """
    given = {"speedup": speedup, "fraction": fraction, "latency_ms": latency_ms}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = " and ".join(named) or "none"
        raise InputError(f"give one budget, speedup=, fraction= or latency_ms= (or exact=True); found {found}")
    value = given[named[0]]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"{named[0]} must be a positive number, found {value!r}")
    if not 1e-9 <= value <= 1e12:
        raise InputError(f"{named[0]} must be between 1e-9 and 1e12, found {value!r:.20}")
    if speedup is not None and speedup < 1:
        raise InputError(f"speedup must be at least 1, found {speedup}: nothing is made slower on request")
    if fraction is not None and fraction > 1:
        raise InputError(f"fraction must be above 0 and at most 1 (the part of the latency that may remain), found {fraction}")
    return 1 / speedup if speedup is not None else fraction


def budget_ns(text: str, original_ns: int) -> int:
    """A budget as text, in nanoseconds, rounded down.

    Args:
        text: ``1.5x`` (so many times faster), ``60%`` (of the latency), or ``12.5ms``.
        original_ns: latency of the folded original.

    Raises:
        InputError: it is nothing of these, or out of range.

    >>> budget_ns("2x", 1001), budget_ns("60%", 1000), budget_ns("0.5 ms", 0)
    (500, 600, 500000)
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(x|%|ms)\s*", text)
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or math.isnan(value):
        raise InputError(f"a budget is 1.5x (faster), 60% (of the latency) or 12.5ms; found {text!r}")
    if match[2] == "ms":
        asked_fraction(None, None, value)
        return math.floor(value * 1e6)
    fraction = asked_fraction(value, None, None) if match[2] == "x" else asked_fraction(None, value / 100, None)
    return math.floor(original_ns * (fraction or 0.0))
