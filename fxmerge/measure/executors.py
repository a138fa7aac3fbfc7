"""Where work runs: here, in processes of this machine, on a Ray cluster.

A job is prepared once in every worker, then does one task after the other. Results come back as they are done, in any order, to
the one process that asked, which alone writes to the store; a worker that dies costs the tasks in flight.
"""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch

from fxmerge.errors import InputError, WorkerError
from fxmerge.graph.portable import message


class Job(Protocol):
    """Work that can be sent to a worker: pickled once, prepared once, then called for every task."""

    def prepare(self, device: str = "") -> Callable[[Any], Any]:
        """What does one task, with all that can be made beforehand; on a device, or where the job is."""


class Executor(Protocol):
    """Where the tasks of a job run."""

    @property
    def workers(self) -> int:
        """How many tasks run at one time."""

    def run(self, job: Job, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Do all tasks; gives (number of the task, result) as they are done.

        Raises:
            WorkerError: workers keep dying, or cannot be had.
            Exception: what a task raises; the others in flight are given up.
        """


@dataclass(frozen=True)
class Local:
    """One task after the other, in this process."""

    @property
    def workers(self) -> int:
        return 1

    def run(self, job: Job, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        work = job.prepare()
        for number, task in enumerate(tasks):
            yield number, work(task)


@dataclass(frozen=True)
class Processes:
    """Processes of this machine, started anew (``spawn``): a script that uses them needs the usual ``__main__`` guard.

    Args:
        workers: how many.
        threads: of each; 0 shares the processors out evenly.
        attempts: how often workers may die without a task being finished before giving up.
    """

    workers: int = 2
    threads: int = 0
    attempts: int = 3

    def __post_init__(self) -> None:
        if self.workers < 1 or self.threads < 0 or self.attempts < 1:
            raise InputError(f"{self}: workers and attempts are at least 1, threads at least 0")

    def run(self, job: Job, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        left = dict(enumerate(tasks))
        sent = message(job)
        failures = 0
        while left:
            before = len(left)
            for number, (result, warned) in self._until_one_dies(sent, left):
                del left[number]
                _warn_again(warned)
                yield number, result
            failures = failures + 1 if len(left) == before else 0
            if failures >= self.attempts:
                raise WorkerError(
                    f"worker processes died {failures} times in a row, with {len(left)} of {len(tasks)} tasks to do: is there "
                    f"memory for {self.workers} of them? Is the script's main part under `if __name__ == '__main__'`? What "
                    "was finished is kept; run the same again, with fewer workers",
                    done=len(tasks) - len(left),
                    left=len(left),
                )

    def _until_one_dies(self, sent: bytes, tasks: dict[int, Any]) -> Iterator[tuple[int, _Outcome]]:
        """Results as they come; ends when all are there, or when a worker has died and those finished before it are given."""
        threads = self.threads or max(1, (os.cpu_count() or 1) // self.workers)
        context = multiprocessing.get_context("spawn")
        # The job goes by file: a worker that dies before it has read a long pipe would leave this process writing for ever.
        with tempfile.TemporaryDirectory(prefix="fxmerge-") as folder:
            job = Path(folder) / "job"
            job.write_bytes(sent)
            pool = ProcessPoolExecutor(min(self.workers, len(tasks)), context, _start, (str(job), threads))
            try:
                futures: dict[Future[_Outcome], int] = {}
                with suppress(BrokenProcessPool):  # a worker can die while tasks are still being handed out
                    for number, task in list(tasks.items()):
                        futures[pool.submit(_work, task)] = number
                while futures:
                    for future in wait(futures, return_when=FIRST_COMPLETED).done:
                        number = futures.pop(future)
                        if not isinstance(future.exception(), BrokenProcessPool):
                            yield number, future.result()
            finally:
                workers = list((getattr(pool, "_processes", None) or {}).values())
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in workers:  # at an error, what they are at is not wanted any more
                    worker.terminate()


@dataclass(frozen=True)
class Ray:
    """A Ray cluster (extra ``[ray]``): each task is a task of Ray's, and asks for what it needs.

    Args:
        address: of the cluster; None for the one that Ray is connected to or finds, or a new one on this machine.
        cpus: processors for each task; it runs with as many threads.
        gpus: GPUs for each task, or a part of one; network and images are moved there.
        attempts: how often a task is started again after its worker or node was lost.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    attempts: int = 3

    def __post_init__(self) -> None:
        if self.cpus < 0 or self.gpus < 0 or self.attempts < 0:
            raise InputError(f"{self}: nothing of this can be negative")

    @property
    def workers(self) -> int:
        resources = self._connected().cluster_resources()
        shares = [resources.get(name, 0) / share for name, share in (("CPU", self.cpus), ("GPU", self.gpus)) if share]
        return max(1, int(min(shares, default=1)))

    def run(self, job: Job, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        ray = self._connected()
        sent = message(job)
        held = ray.put(sent)
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": self.attempts, "retry_exceptions": False}
        remote = ray.remote(_work_of).options(**options)
        name, threads = hashlib.sha256(sent).hexdigest(), max(1, int(self.cpus))
        # In a list, the job is not fetched for every task, only where a worker has not prepared it.
        device = "cuda" if self.gpus else ""
        pending = {remote.remote(name, [held], threads, device, task): number for number, task in enumerate(tasks)}
        try:
            while pending:
                for done in ray.wait(list(pending), num_returns=1)[0]:
                    number = pending.pop(done)
                    result, warned = self._result(ray, done, number, (len(tasks) - len(pending) - 1, len(pending) + 1))
                    _warn_again(warned)
                    yield number, result
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)

    def _result(self, ray: Any, done: Any, number: int, counts: tuple[int, int]) -> _Outcome:
        try:
            outcome: _Outcome = ray.get(done)
        except ray.exceptions.RayTaskError as fault:
            raise fault.cause from fault
        except ray.exceptions.RayError as fault:
            text = str(fault).splitlines()[0]
            raise WorkerError(
                f"task {number} was lost {self.attempts + 1} times ({text}). What was finished is kept; run the same again",
                done=counts[0],
                left=counts[1],
            ) from fault
        return outcome

    def _connected(self) -> Any:
        try:
            ray = importlib.import_module("ray")
        except ImportError as fault:
            raise InputError("Ray is not installed: pip install 'fxmerge[ray]'") from fault
        if not ray.is_initialized():
            try:
                ray.init(address=self.address, log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError) as fault:
                raise WorkerError(f"no Ray cluster at {self.address or 'this machine'}: {fault}", done=0, left=0) from fault
        return ray


def as_executor(given: Executor | ExecutorName) -> Executor:
    """An executor by its name, or as it is.

    Raises:
        InputError: there is none of this name.

    >>> as_executor("local")
    Local()
    """
    named: dict[str, Callable[[], Executor]] = {"local": Local, "processes": Processes, "ray": Ray}
    if not isinstance(given, str):
        return given
    if given not in named:
        raise InputError(f"unknown executor {given!r}; there are {', '.join(named)}, or give an object")
    return named[given]()


#: The executors that have a name.
ExecutorName: TypeAlias = Literal["local", "processes", "ray"]
#: What a task gave, and the warnings it raised.
_Outcome: TypeAlias = tuple[Any, list[str]]

_prepared: dict[str, Callable[[Any], Any]] = {}  # in a worker: its job, by name


def _start(job: str, threads: int) -> None:
    """What fails here is raised by the first task: raised here, it would look like a worker that died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the one that started them ends them
    torch.set_num_threads(threads)
    try:
        _prepared[""] = pickle.loads(Path(job).read_bytes()).prepare()
    except Exception as fault:
        _prepared[""] = partial(_raise, fault)


def _raise(fault: Exception, task: Any) -> Any:
    raise fault


def _work(task: Any) -> _Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = _prepared[""](task)
    return result, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def _work_of(name: str, held: Sequence[Any], threads: int, device: str, task: Any) -> _Outcome:
    """One task of a job, prepared where this worker process has not done so."""
    if name not in _prepared:
        _prepared.clear()
        torch.set_num_threads(threads)
        _prepared[name] = pickle.loads(importlib.import_module("ray").get(held[0])).prepare(device)
    _prepared[""] = _prepared[name]
    return _work(task)


def _warn_again(messages: Sequence[str]) -> None:
    for text in messages:
        warnings.warn(text, stacklevel=3)
