"""Other programs on the machine: time that the threads of what is being timed wait for a core.

Modules are timed in turn, so a machine that is slow is slow for all of them; but not by the same factor: layers that use all cores
lose most by a program that takes one. A plan chosen by such tables may not pay on a quiet machine. README's demonstration, beside
a training run, took a plan that it measured 1.56x as fast; measured later, it was 0.96x to 1.00x.

Linux counts, thread by thread, the nanoseconds on a core and those ready to run but without one. While
ResNet-18 was timed on two cores (torch 2.15), that was 1 % of their time on a quiet machine and 50 % beside a training run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_TOLERATED = 0.05
"""Of the time that the threads wanted to run, above which it is told."""
_THREADS = Path("/proc/self/task")


@contextmanager
def contention_told(what: str) -> Iterator[None]:
    """Say so, afterwards, if the threads of this process had to wait for cores; where the system does not count it, say nothing.

    Args:
        what: was timed meanwhile.
    """
    before = _ran_and_waited()
    yield
    ran, waited = (after - earlier for after, earlier in zip(_ran_and_waited(), before, strict=True))
    if ran > 0 and waited > _TOLERATED * (ran + waited):
        log.warning(
            "while %s timed, threads waited %.0f %% of their time for a core: other programs run on this machine, or there are "
            "more threads than cores. Times taken so tell little of a quiet machine; take them again when it is one, without a "
            "store that holds them",
            what,
            100 * waited / (ran + waited),
        )


def _ran_and_waited() -> tuple[int, int]:
    """Nanoseconds of all threads of this process so far: on a core, and waiting for one."""
    ran = waited = 0
    for file in _THREADS.glob("*/schedstat"):
        try:
            running, waiting, _ = file.read_text(encoding="ascii").split()
        except (OSError, ValueError):  # the thread is gone; or the system does not count
            continue
        ran, waited = ran + int(running), waited + int(waiting)
    return ran, waited
