"""The whole story on one screen: from a model and a budget to a merged network that meets it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.fx import GraphModule

from fxmerge.algebra.affine import Affine
from fxmerge.analysis.candidates import Space, propose
from fxmerge.analysis.segments import Findings, find_segments
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.segment import Proposal
from fxmerge.core.table import ImportanceTable, LatencyTable, Measurement, Target
from fxmerge.errors import CalibrationError, InputError, NothingToMergeError
from fxmerge.graph.trace import as_arguments, trace
from fxmerge.measure.calibration import Batch, as_batches
from fxmerge.measure.latency import baseline, measure_latency, worthwhile
from fxmerge.measure.progress import Bars
from fxmerge.measure.reconstruction import Reconstruction
from fxmerge.measure.timer import Timer
from fxmerge.operators import Map, Operators
from fxmerge.result import Result
from fxmerge.search import Search, build_networks
from fxmerge.solve.frontier import solve_tables
from fxmerge.solve.objective import Objective
from fxmerge.testing import assert_equivalent

log = logging.getLogger(__name__)


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    speedup: float | None = None,
    fraction: float | None = None,
    latency_ms: float | None = None,
    calibration: Any = None,
    exact: bool = False,
    space: Space | Literal["joint", "composed", "activations", "layers", "exact"] = "joint",
    objective: Objective = "additive-loss",
    target: Target | None = None,
    timer: Timer | None = None,
    scorer: Reconstruction | None = None,
    operators: Operators | None = None,
    tolerance: float = 0.03,
    corrections: int = 4,
    progress: bool = False,
) -> Result:
    """Make a network faster by making it shallower.

    Args:
        model: the trained network; it is not changed. Its eval-mode behaviour is what counts.
        example_inputs: a tensor, or the tuple of arguments; their batch and image size are what latency is measured for.
        speedup: the budget: how many times faster than the original with its batch norms folded. Or:
        fraction: ... which fraction of that original's latency may remain, above 0 and up to 1. Or:
        latency_ms: ... how many milliseconds the network may take.
        calibration: a few hundred unlabelled inputs: a tensor, or an iterable of inputs or (input, label) pairs.
        exact: keep the function; take only merges that pay. Needs neither budget nor calibration.
        space: which candidates are offered; see :class:`fxmerge.Space`.
        objective: what plans are ranked by: the sum of losses, or ``layermerge``, the published sum of exp(change).
        target: where and how the network will run; None for this CPU, the inputs' dtype.
        timer: what measures latency, of single modules and of the whole; None for :class:`fxmerge.InterleavedTimer`.
        scorer: what measures importance and fits weights; None for :class:`fxmerge.Reconstruction`.
        operators: what is known of operators; None for the default table.
        tolerance: how far over the budget the measured latency may be, as a fraction of it.
        corrections: how often to measure, correct the budget and solve again.
        progress: show bars on standard error.

    Returns:
        The merged network, its trainable student, the plan, the front and all tables.

    Raises:
        TraceError, InputError, NotFiniteError: the model, its inputs or an option cannot be used.
        CalibrationError: the calibration data cannot be used.
        NothingToMergeError: the network holds no convolution.
        BudgetError: no plan meets the budget; carries the fastest latency there is.
    """
    arguments = as_arguments(example_inputs)
    if objective not in get_args(Objective):
        raise InputError(f"objective must be one of {', '.join(get_args(Objective))}, found {objective!r}")
    asked = None if exact else _asked_fraction(speedup, fraction, latency_ms)
    _check_search(tolerance, corrections)
    target = _target(target, arguments)
    space = _space("exact" if exact else space)
    # What is made here is to be trained, wherever it is made; and the caller's random numbers are the caller's.
    with torch.inference_mode(False), _own_random_numbers(target), Bars(progress) as bars:
        graph = trace(model, example_inputs, leaves=operators.modules if operators else ())
        batches = () if exact else _calibration(calibration, graph)
        findings = find_segments(graph, operators=operators)
        proposals = _offered(findings, space)
        latency = measure_latency(findings, proposals, arguments, target=target, timer=timer, progress=bars("latency"))
        proposals = worthwhile(proposals, latency, findings.region)
        scorer = scorer or Reconstruction()
        importance = scorer.score(findings, proposals, batches, progress=bars("importance"))
        candidates = [candidate for proposal in proposals for candidate in proposal.candidates]
        front = solve_tables(findings.region, candidates, latency, importance, findings.fingerprint, objective=objective)
        original = baseline(graph, operators=findings.operators)
        search = Search(findings, front, original, arguments, target, tolerance, timer)
        weights: Mapping[str, Affine] = {}
        if exact:
            plan, measured = search.best_exact()
        else:
            tried = search.within(asked, latency_ms, corrections, bars("budget"))
            plan, measured, weights = search.best_near(tried, asked, latency_ms, scorer, batches, bars("fit"))
        return build(findings, plan, weights, front, proposals, latency, importance, measured, arguments)


def build(
    findings: Findings,
    plan: Plan,
    weights: Mapping[str, Affine],
    front: ParetoFront,
    proposals: Sequence[Proposal],
    latency: LatencyTable,
    importance: ImportanceTable,
    measured: tuple[Measurement, Measurement],
    arguments: tuple[Any, ...],
) -> Result:
    """Student and merged network of a plan, checked against each other, with all that led to them."""
    student, merged = build_networks(findings, plan, weights)
    assert_equivalent(student, merged, [arguments])
    return Result(
        model=merged,
        student=student,
        plan=plan,
        front=front,
        findings=findings,
        proposals=tuple(proposals),
        baseline=baseline(findings.graph, operators=findings.operators),
        latency=latency,
        importance=importance,
        measured=measured,
        example_inputs=arguments,
        weights=dict(weights),
    )


def _asked_fraction(speedup: float | None, fraction: float | None, latency_ms: float | None) -> float | None:
    """The budget as a fraction of the folded original's latency; None where it is absolute."""
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


def _check_search(tolerance: float, corrections: int) -> None:
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance must be a number from 0 on, found {tolerance!r}")
    if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 0:
        raise InputError(f"corrections must be a whole number from 0 on, found {corrections!r}")


def _space(space: Space | str) -> Space:
    if isinstance(space, Space):
        return space
    try:
        return Space.named(space)  # type: ignore[arg-type]
    except (KeyError, TypeError) as fault:
        names = "joint, composed, activations, layers or exact"
        raise InputError(f"space must be an fxmerge.Space or one of {names}, found {space!r}") from fault


def _own_random_numbers(target: Target) -> AbstractContextManager[Any]:
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
    return Target(device=first.device.type, dtype=str(floating).removeprefix("torch."))


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
