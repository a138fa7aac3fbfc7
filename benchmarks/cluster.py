"""What many devices would change, by arithmetic from tasks that were measured one after the other.

    time on w workers = driver + packing + preparing + makespan(tasks, w) + solving

The driver (what splits the work, collects and checks results) is one process. Packing the job is done once; unpacking and
preparing it is done by every worker, all at a time. Tasks go to whichever worker is free, in the order given, as Ray's do, so the
makespan is at least the longest task and at least the sum over w. Not in it, as one machine cannot tell: the network between
the machines, and how long a cluster takes to start a process.
"""

from __future__ import annotations

import heapq
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from fxmerge.graph.portable import message
from fxmerge.measure.executors import Job


@dataclass
class Watched:
    """An executor: one task after the other, here, cut as for so many workers; remembers what each took.

    Args:
        workers: for how many the work is cut.
    """

    workers: int
    packing: float = 0.0
    preparing: float = 0.0
    bytes_sent: int = 0
    tasks: list[float] = field(default_factory=list)

    def run(self, job: Job, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """As a worker would: from a copy of the job that was sent."""
        start = time.perf_counter()
        sent = message(job)
        packed = time.perf_counter()
        work = pickle.loads(sent).prepare()
        self.packing, self.preparing, self.bytes_sent = packed - start, time.perf_counter() - packed, len(sent)
        for number, task in enumerate(tasks):
            start = time.perf_counter()
            result = work(task)
            self.tasks.append(time.perf_counter() - start)
            yield number, result


def makespan(tasks: Sequence[float], workers: int) -> float:
    """Seconds until the last task is done, each given to the worker that is free first.

    >>> makespan([3, 1, 1, 1], 2), makespan([3, 1, 1, 1], 9)
    (3, 3)
    """
    free = [0.0] * min(workers, len(tasks))
    for seconds in tasks:
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free, default=0.0)


def report(what: str, watched: Sequence[Watched], totals: Sequence[float], latency: float, solving: float) -> str:
    """The arithmetic as Markdown.

    Args:
        what: was scored, by what.
        watched: the same work, cut for one worker and for more.
        totals: seconds that each took in all, in this one process.
        latency, solving: seconds of what is not shared out.
    """
    rows = []
    for cut, total in zip(watched, totals, strict=True):
        driver = max(0.0, total - cut.packing - cut.preparing - sum(cut.tasks))
        there = driver + cut.packing + cut.preparing + makespan(cut.tasks, cut.workers)
        seconds = (sum(cut.tasks), max(cut.tasks), driver, cut.packing, cut.preparing, there)
        rows.append((cut.workers, len(cut.tasks), *(f"{s:.3f}" for s in seconds), f"{totals[0] / there:.1f}x"))
    heads = ("workers", "tasks", "all tasks", "longest", "driver", "packing", "preparing", "importance in", "faster")
    most = watched[-1]
    last = makespan(most.tasks, most.workers)
    bound = "the longest task" if last < 1.01 * max(most.tasks) else "the sum of all tasks"
    return (
        f"{what}; the job that every worker is sent has {most.bytes_sent / 2**20:.1f} MiB. Seconds; *importance in* is arithmetic, "
        "all else was measured, here:\n\n"
        + tabulate(rows, heads, "github", disable_numparse=True)
        + f"\n\nWith {most.workers:,} workers what is left is bound by {bound}: {last:.3f} s of makespan. Latency "
        f"({latency:.1f} s) is measured one part at a time on one device of the kind that counts, and solving ({solving:.3f} s) is "
        f"one process; neither changes. In all: {totals[0] + latency + solving:.1f} s here, "
        f"{float(rows[-1][-2]) + latency + solving:.1f} s there."
    )
