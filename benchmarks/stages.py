"""Seconds of the stages of a benchmark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add what is done inside to the seconds of a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:  # a refusal takes its time, too
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
