"""How long modules take: timed in turn, on fresh inputs, with median and spread.

    latency = median over rounds of (median over a round's runs);   spread = distance between the rounds' quartiles

A round runs every module, in an order that turns and reverses from round to round, so that a machine that slows down
slows all of them. A cheap module runs several times in a round, yet not twice in a row while others wait, and every run
gets a fresh copy of its input. That is what makes layers, timed apart, add up to the network. Sum over end to end, with
batch norms folded, medians of 4 to 12 rounds, torch 2.14 on 2 cores with 48 MB of cache and other work beside:

    network, batch, pixels, layout        one input, module in a loop     fresh input, modules in turn
    resnet18, 32, 64, contiguous          0.95 - 0.98                     0.98 - 1.00
    resnet18, 32, 64, channels last       0.96                            1.13 - 1.17
    resnet18, 1, 64, channels last        0.65                            0.89 - 0.92
    mobilenet_v2, 1, 224, channels last   0.67 - 0.74                     0.88 - 1.02
    mobilenet_v2, 8, 224, channels last   0.66 - 0.77                     0.89 - 1.05
    mobilenet_v2, 8, 224, contiguous      0.66 - 0.73                     0.89 - 0.97
    resnet50, 2, 224, channels last       0.79                            0.90 - 0.93

In a loop a module finds its weights in the cache and memory for its output at hand; in a network, others have used both
meanwhile (page faults are a third of mobilenet_v2 at batch 8). Flushing 4 MB of cache before each run overshot by up to
15 %, handing free memory back to the system by 25 to 90 %. So give many modules at once: few small ones, which stay in
the cache together, come out up to a third too fast.
"""

from __future__ import annotations

import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol, TypeGuard

import torch
from torch import nn

from fxmerge.core.table import Measurement, Target
from fxmerge.errors import InputError, MeasurementError
from fxmerge.measure.contention import contention_told
from fxmerge.measure.paging import watched
from fxmerge.measure.progress import Progress
from fxmerge.measure.running import DTYPES, Inputs, Run, alone_on, copies, laid_out, prepare, running_on, versions


@dataclass(frozen=True, eq=False)
class Timed:
    """A module to time, and what goes in.

    Args:
        module: any module; it is not changed.
        inputs: for each argument a tensor, of which every run gets a copy; a shape, for which the timer draws noise; or anything
            else, given as it is, tensors inside copied.
        thorough: give it a sample in every round, whatever that takes.
    """

    module: nn.Module
    inputs: Inputs
    thorough: bool = False


class SampleLog(Protocol):
    """Where samples are written as they are taken, and read when a run goes on where another stopped."""

    def earlier(self, index: int) -> Sequence[int]:
        """The samples of a module, by its place among those given, that are there already; nanoseconds."""

    def add(self, samples: Mapping[int, tuple[int, int]]) -> None:
        """Write for each module of a round (the sample's number, nanoseconds)."""


class Timer(Protocol):
    """What measures: one measurement for each module, in the order given; ``progress(done, total)`` hears of it.

    To fill a store it needs a property ``settings``, too: a text that says how it measures, under which its numbers are kept.
    """

    def __call__(self, modules: Sequence[Timed], *, target: Target, progress: Progress | None = None) -> tuple[Measurement, ...]:
        """Time the modules on the target."""


@dataclass(frozen=True)
class InterleavedTimer:
    """Times modules in turn, round by round.

    Args:
        rounds: samples of each module; a module whose spread is too large gets up to as many again.
        warmup: runs before the first that counts.
        min_seconds_per_sample: how long a module runs in a round, if max_runs_per_sample allows.
        max_runs_per_sample: bound on the runs of a module in one round.
        max_seconds_per_module: a module that would take longer gets fewer rounds, evenly spaced, but at least 3; extra
            rounds, warm-up and the copying of inputs come on top.
        steady_spread: spread over median from which on a module is measured again.
        seed: of the noise that goes in.
        cuda_graphs: on a GPU, capture each module once and replay it; its buffers then live until the end.
        log: where samples are kept as they come, so that a run that dies loses one round at most.
        clock: nanoseconds; CPU only, a GPU has its own.

    Only one timer at a time runs on a device of a machine: another, in whatever process of this user, waits for it.

    Raises (when called):
        InputError: the target cannot be had here.
        MeasurementError: a module cannot be run.

    >>> timer = InterleavedTimer(rounds=3)
    >>> [conv] = timer([Timed(nn.Conv2d(3, 8, 3), ((1, 3, 16, 16),))], target=Target())
    >>> conv.repeats >= 3 and conv.median_ns > 0
    True
    """

    _: KW_ONLY
    rounds: int = 11
    warmup: int = 2
    min_seconds_per_sample: float = 0.001
    max_runs_per_sample: int = 20
    max_seconds_per_module: float = 0.5
    steady_spread: float = 0.15
    seed: int = 0
    cuda_graphs: bool = False
    log: SampleLog | None = field(default=None, repr=False, compare=False)
    clock: Callable[[], int] = field(default=time.perf_counter_ns, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("rounds", "warmup", "max_runs_per_sample"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def settings(self) -> str:
        """All that decides what is measured."""
        names = ("rounds", "warmup", "min_seconds_per_sample", "max_runs_per_sample", "max_seconds_per_module", "steady_spread")
        return f"interleaved {' '.join(f'{name}={getattr(self, name)}' for name in (*names, 'cuda_graphs'))}"

    def __call__(self, modules: Sequence[Timed], *, target: Target, progress: Progress | None = None) -> tuple[Measurement, ...]:
        """Time the modules; a step of progress is a warm-up, or a module's share of a round that is no extra one."""
        tell = progress or (lambda done, total: None)
        total = len(modules) * (1 + self.rounds)
        subjects: list[_Subject] = []
        with running_on(target), alone_on(target.device):
            bench = _Bench(self, target, _noise(modules, target, self.seed))
            for index, timed in enumerate(modules):
                subjects.append(bench.subject(index, timed))
                tell(index + 1, total)
            with contention_told("1 module was" if len(modules) == 1 else f"{len(modules)} modules were"):
                bench.rounds(subjects, lambda done: tell(len(modules) * (1 + done), total))
            facts = versions(target)
        return tuple(summary(s.samples, target, facts) for s in subjects)


def compare(modules: Sequence[Timed], *, target: Target, rounds: int = 15) -> tuple[Measurement, ...]:
    """Time whole networks against each other: one run of each in every round, ABC CBA BCA ACB ...

    Args:
        modules: the networks, with example inputs or shapes.
        target: where and how they run.
        rounds: samples of each, one run a sample; those that come out unsteady get up to as many again.

    Raises:
        InputError: the target cannot be had here.
        MeasurementError: a network cannot be run.
    """
    return for_networks(rounds)(modules, target=target)


def for_networks(rounds: int = 15) -> InterleavedTimer:
    """How whole networks are timed: one run a sample, as many samples as asked for."""
    return InterleavedTimer(rounds=rounds, max_runs_per_sample=1, max_seconds_per_module=math.inf)


@dataclass(eq=False)
class _Subject:
    """A module on the bench: how it runs, on what, how often, and the nanoseconds of a run in every round."""

    index: int
    name: str
    run: Run
    fresh: Callable[[], Inputs]
    turns: int = 1
    burst: int = 1
    rounds: int = 1
    samples: list[int] = field(default_factory=list)

    def wants(self, number: int) -> bool:
        """Whether the sample of this number is still to be taken; an earlier run may have."""
        return len(self.samples) <= number

    @property
    def median(self) -> int:
        return _median(self.samples)

    @property
    def spread(self) -> int:
        return _spread(self.samples)


def summary(samples: Sequence[int], target: Target, facts: Mapping[str, str]) -> Measurement:
    """Samples, in nanoseconds, as a measurement; ``facts`` from :func:`versions`."""
    return Measurement(_median(samples), _spread(samples), len(samples), target, facts)


def _median(samples: Sequence[int]) -> int:
    return math.ceil(statistics.median(samples))


def _spread(samples: Sequence[int]) -> int:
    if len(samples) < 2:
        return 0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return math.ceil(high - low)


class _Bench:
    """Where modules run, one at a time; every shape is a view of one buffer of noise."""

    def __init__(self, timer: InterleavedTimer, target: Target, noise: torch.Tensor) -> None:
        self.timer, self.target, self.noise, self.on_gpu = timer, target, noise, noise.is_cuda
        self.held: dict[tuple[object, ...], torch.Tensor] = {}

    def subject(self, index: int, timed: Timed) -> _Subject:
        """Convert, compile and warm up a module; decide how often it is to run."""
        name = textwrap.shorten(repr(timed.module), 80)
        with _blame(index, name):
            run, sources = prepare(timed.module, tuple(map(self._source, timed.inputs)), self.target)
            fresh = copies(sources)
            if self.on_gpu and self.timer.cuda_graphs:
                run, fresh = self._captured(run, sources)
        earlier = list(self.timer.log.earlier(index)) if self.timer.log is not None else []
        subject = _Subject(index, name, run, fresh, samples=earlier)
        laps = [self._lap(subject) for _ in range(self.timer.warmup)]
        if timed.thorough and not self.on_gpu:
            laps.append(watched(lambda: self._lap(subject), type(timed.module).__name__))
        self._plan(subject, max(1, min(laps)), timed.thorough)
        return subject

    def _plan(self, subject: _Subject, ns: int, thorough: bool) -> None:
        """Several runs a round: apart from each other on a CPU, back to back on a GPU, as kernels are in a network."""
        runs = min(self.timer.max_runs_per_sample, max(1, math.ceil(self.timer.min_seconds_per_sample * 1e9 / ns)))
        subject.turns, subject.burst = (1, runs) if self.on_gpu else (runs, 1)
        affordable = self.timer.max_seconds_per_module * 1e9 / (ns * runs)
        subject.rounds = self.timer.rounds if thorough else int(min(self.timer.rounds, max(3, affordable)))

    def rounds(self, subjects: Sequence[_Subject], done: Callable[[int], None]) -> None:
        """All samples; then more, of those whose spread is too large."""
        count = self.timer.rounds
        for number in range(count):
            due = [s for s in subjects if number * s.rounds % count < s.rounds]
            self.round([s for s in due if s.wants(number * s.rounds // count)], number)
            done(number + 1)
        for number in range(count):
            unsteady = [s for s in subjects if s.spread > self.timer.steady_spread * s.median]
            self.round([s for s in unsteady if number < s.rounds and s.wants(s.rounds + number)], number)

    def round(self, subjects: Sequence[_Subject], number: int) -> None:
        """One more sample of each; odd rounds go backwards, and each pair of rounds starts one module further on."""
        start = number // 2 % max(1, len(subjects))
        order = [*subjects[start:], *subjects[:start]][:: -1 if number % 2 else 1]
        laps: dict[_Subject, list[int]] = {subject: [] for subject in order}
        for turn in range(max((s.turns for s in order), default=0)):
            for subject in order:
                if turn < subject.turns:
                    laps[subject].append(self._lap(subject))
        for subject, ns in laps.items():
            subject.samples.append(math.ceil(statistics.median(ns)))
        if self.timer.log is not None and order:
            self.timer.log.add({subject.index: (len(subject.samples) - 1, subject.samples[-1]) for subject in order})

    def _lap(self, subject: _Subject) -> int:
        """Nanoseconds of a run, the freeing of its output included, the making of its input not."""
        with _blame(subject.index, subject.name):
            inputs = [subject.fresh() for _ in range(subject.burst)]
            if self.on_gpu:
                return _gpu_ns(subject.run, inputs)
            start = self.timer.clock()
            subject.run(*inputs[0])
            return self.timer.clock() - start

    def _source(self, given: object) -> object:
        if not _is_shape(given):
            return given
        strides = laid_out(torch.empty(given, device="meta"), self.target).stride()
        return self.noise.as_strided(given, strides)

    def _captured(self, run: Run, sources: Inputs) -> tuple[Run, Callable[[], Inputs]]:
        """A CUDA graph of the run, and the filling of its inputs, which all graphs with such inputs share."""
        statics = tuple(self._static(place, source) for place, source in enumerate(sources))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(*statics)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(*statics)
        return lambda *_: graph.replay(), lambda: tuple(map(_refilled, statics, sources))

    def _static(self, place: int, source: Any) -> Any:
        if not isinstance(source, torch.Tensor):
            return source
        return self.held.setdefault((place, source.shape, source.stride(), source.dtype), source.clone())


def _refilled(static: Any, source: Any) -> Any:
    return static.copy_(source) if isinstance(static, torch.Tensor) else static


def _is_shape(given: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(given, tuple) and all(isinstance(size, int) for size in given)


def _noise(modules: Sequence[Timed], target: Target, seed: int) -> torch.Tensor:
    """Standard normal numbers, as many as the largest shape needs: no denormals, which are slow."""
    shapes = [given for timed in modules for given in timed.inputs if _is_shape(given)]
    count = max(map(math.prod, shapes), default=0)
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return noise.to(target.device, DTYPES[target.dtype])


def _gpu_ns(run: Run, inputs: Sequence[Inputs]) -> int:
    """Nanoseconds of a run, from two events on the current stream with the runs queued back to back between them."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for given in inputs:
        run(*given)
    stop.record()
    stop.synchronize()
    return math.ceil(float(start.elapsed_time(stop)) * 1e6 / len(inputs))


@contextmanager
def _blame(index: int, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as cause:
        raise MeasurementError(f"module {index}, {name}, cannot be timed: {cause!r}", index=index) from cause
