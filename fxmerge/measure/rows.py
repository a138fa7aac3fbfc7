"""What the columns of a store may hold: SQLite keeps whatever it is given, a text in a column of numbers too.

All raise ValueError, which says what was found in which column; the store adds the table and the row.
"""

from __future__ import annotations

import math
from typing import Any

from fxmerge.core.table import Importance, Measurement, Target


def measurement(median_ns: Any, spread_ns: Any, repeats: Any, target: Target, versions: dict[str, str]) -> Measurement:
    """A latency; 0 is that of a part, to a timer that counts instead of timing."""
    median, spread = whole("median_ns", median_ns, 0), whole("spread_ns", spread_ns, 0)
    return Measurement(median, spread, whole("repeats", repeats, 0), target, versions)


def importance(loss: Any, samples: Any, scorer: Any) -> Importance:
    """A score."""
    if not isinstance(loss, (int, float)) or not math.isfinite(loss):
        raise ValueError(f"loss is {loss!r:.80}, expected a finite number")
    if not isinstance(scorer, str):
        raise ValueError(f"scorer is {scorer!r:.80}, expected a text")
    return Importance(float(loss), whole("samples", samples, 0), scorer)


def whole(column: str, value: Any, least: int) -> int:
    """A whole number from some on.

    >>> whole("ns", 5, 0)
    5
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{column} is {value!r:.80}, expected a whole number from {least} on")
    return value
