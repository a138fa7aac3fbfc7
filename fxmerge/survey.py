"""From a model to its two tables: all that is measured before anything is chosen."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from fxmerge.analysis.candidates import Space, propose
from fxmerge.analysis.segments import Findings, find_segments
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.core.table import ImportanceTable, LatencyTable, Target
from fxmerge.errors import CalibrationError, InputError, NothingToMergeError
from fxmerge.graph.trace import as_arguments, trace
from fxmerge.measure.calibration import Batch, as_batches
from fxmerge.measure.executors import Executor, ExecutorName, as_executor
from fxmerge.measure.latency import measure_latency, worthwhile
from fxmerge.measure.progress import Bars
from fxmerge.measure.reconstruction import Reconstruction
from fxmerge.measure.refit import layers_to_fit
from fxmerge.measure.scoring import Scorer, fitter_of, score
from fxmerge.measure.store import Store
from fxmerge.measure.study import Study
from fxmerge.measure.timer import Timer
from fxmerge.operators import Map, Operators
from fxmerge.solve.objective import Objective

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Survey:
    """A network, what could be merged in it, and what that costs and takes.

    Args:
        name: of the model's class.
        findings: segments and refusals of the traced graph.
        proposals: the candidates that are faster than what they replace.
        batches: calibration data.
        latency, importance: the tables.
        arguments: example inputs.
        target: where and how latency was measured.
        kept: the store that all is in, if there is one, and in it the digest of the study.
    """

    name: str
    findings: Findings
    proposals: tuple[Proposal, ...]
    batches: tuple[Batch, ...]
    latency: LatencyTable
    importance: ImportanceTable
    arguments: tuple[Any, ...]
    target: Target
    kept: tuple[Store, str] | None = None

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return tuple(candidate for proposal in self.proposals for candidate in proposal.candidates)

    @property
    def study(self) -> Study:
        """What the solver needs, without the network."""
        found = self.findings
        return Study(self.name, found.fingerprint, found.region, self.candidates, self.latency, self.importance)


def survey(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Any = None,
    exact: bool = False,
    space: Space | Literal["joint", "composed", "activations", "layers", "exact"] = "joint",
    target: Target | None = None,
    timer: Timer | None = None,
    scorer: Scorer | None = None,
    objective: Objective = "additive-loss",
    store: Store | None = None,
    executor: Executor | ExecutorName = "local",
    operators: Operators | None = None,
    bars: Bars | None = None,
) -> Survey:
    """Trace a model, find what can be merged, and measure what that takes and costs.

    Args:
        store: open, and left so.
        bars: where progress is shown; None for nowhere.

    The others are those of :func:`fxmerge.compress`, and so is what is raised.
    """
    arguments = as_arguments(example_inputs)
    target = _target(target, arguments)
    space = _space("exact" if exact else space)
    runs_on = as_executor(executor)
    log.info(
        "importance is measured by %s, %d tasks at a time", runs_on, runs_on.workers
    )  # a cluster that is not there is told now
    bars = bars or Bars(False)
    # What is made here is to be trained, wherever it is made; and the caller's random numbers are the caller's.
    with torch.inference_mode(False), own_random_numbers(target):
        graph = trace(model, example_inputs, leaves=operators.modules if operators else ())
        batches = () if exact else _calibration(calibration, graph)
        findings = find_segments(graph, operators=operators)
        layers_to_fit(graph, fitter_of(scorer).stay)  # what is wrong is told before anything is measured
        offered = _offered(findings, space)
        latency = measure_latency(findings, offered, arguments, target=target, timer=timer, store=store, progress=bars("latency"))
        proposals = worthwhile(offered, latency, findings.region)
        importance = score(
            findings,
            proposals,
            batches,
            scorer=scorer or Reconstruction(),
            latency=latency,
            store=store,
            executor=runs_on,
            objective=objective,
            progress=bars("importance"),
        )
        found = Survey(type(model).__name__, findings, proposals, batches, latency, importance, arguments, target)
        return found if store is None else replace(found, kept=(store, store.add_study(found.study)))


def _space(space: Space | str) -> Space:
    if isinstance(space, Space):
        return space
    return Space.named(space)  # type: ignore[arg-type]


def own_random_numbers(target: Target) -> AbstractContextManager[Any]:
    """Put the global generators back afterwards: new layers are initialised with their numbers."""
    gpus = [target.device] if target.device.startswith("cuda") and torch.cuda.is_available() else []
    generators: AbstractContextManager[Any] = torch.random.fork_rng(devices=gpus)
    return generators


def _target(given: Target | None, arguments: tuple[Any, ...]) -> Target:
    """Where to measure: as asked, or where and in which dtype the inputs are."""
    if isinstance(given, Target):
        return given
    if given is not None:
        raise InputError(f"target must be an fxmerge.Target, such as Target(device='cpu'), found {given!r}")
    first = next((a for a in arguments if isinstance(a, torch.Tensor)), torch.empty(0))
    floating = first.dtype if first.is_floating_point() else torch.float32
    return Target(device=str(first.device), dtype=str(floating).removeprefix("torch."))


def _calibration(calibration: Any, graph: GraphModule) -> tuple[Batch, ...]:
    if calibration is None:
        raise CalibrationError("no calibration given: a few hundred unlabelled inputs are needed (or exact=True, which needs none)")
    return as_batches(calibration, graph)


def _offered(findings: Findings, space: Space) -> tuple[Proposal, ...]:
    if not any(isinstance(v, Map) and v.role == "convolution" for v in findings.verdicts.values()):
        reasons = "; ".join(sorted({str(refusal) for refusal in findings.refusals})[:5]) or "it is empty"
        raise NothingToMergeError(f"the network holds no convolution that fxmerge can read: {reasons}")
    proposals = propose(findings, space)
    if not proposals:
        warnings.warn("nothing can be merged in this network; the folded original is returned", stacklevel=3)
    return proposals
