"""Memory that a network gets from the system afresh in every run: time that no layer is to blame for.

glibc hands large tensors back to the system when they are freed, and the next layer's are mapped, page by page, again. Whether it
does depends on sizes and on what the process did before, so that the same network takes different times in different processes.
mobilenet_v2, batch 8, 224 pixels, 2 threads, folded, torch 2.15, timed by hand, in one process each:

    as it is                                                     101 ms in one process, 146 ms in another
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736         72 ms

and plans predicted, before any correction, from tables measured so (`python -m benchmarks.tables --latency-only`; predicted over
measured latency, three budgets each):

                      mobilenet_v2     resnet34         a U-Net
    as it is          0.71 - 1.16      1.02 - 1.06      0.89 - 1.01
    memory kept       0.99 - 1.08      0.96 - 1.03      1.01 - 1.04
"""

from __future__ import annotations

import logging
from collections.abc import Callable

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

KEPT = "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736"
"""What makes glibc keep the memory that it has."""

_NS_OF_A_FAULT = 500
"""Of a page mapped and cleared; twice to four times that on virtual machines."""
_TOLERATED = 0.05
"""Of a network's time, above which it is told."""


def watched(run: Callable[[], int], name: str) -> int:
    """Run once; say so if much of the time goes into fresh pages.

    Args:
        run: gives the nanoseconds that it took.
        name: of what runs.

    Returns:
        What ``run`` gave.
    """
    before = _faults()
    nanoseconds = run()
    faults = _faults() - before
    if faults * _NS_OF_A_FAULT > _TOLERATED * nanoseconds:
        log.warning(
            "%s gets %d MB of memory afresh from the system in every run, at least %.0f %% of its time, more in one process than "
            "in the next. Latencies are steadier, and lower, where freed memory is kept: with glibc by the environment %s, or with "
            "another allocator (jemalloc, tcmalloc)",
            name,
            faults * _page_size() // 2**20,
            100 * faults * _NS_OF_A_FAULT / nanoseconds,
            KEPT,
        )
    return nanoseconds


def _faults() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _page_size() -> int:
    return 4096 if resource is None else resource.getpagesize()
