"""The whole story on one screen: from a model and a budget to a merged network that meets it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from fxmerge.algebra.affine import Affine
from fxmerge.analysis.candidates import Space
from fxmerge.budget import Budget
from fxmerge.core.options import require_number, require_whole
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.table import Measurement, Target
from fxmerge.errors import InputError
from fxmerge.measure.executors import Executor, ExecutorName
from fxmerge.measure.latency import baseline
from fxmerge.measure.progress import Bars
from fxmerge.measure.scoring import Scorer, fitter_of
from fxmerge.measure.store import Store, opened
from fxmerge.measure.timer import Timer
from fxmerge.operators import Operators
from fxmerge.result import Result
from fxmerge.search import Search, build_networks
from fxmerge.solve.objective import Objective
from fxmerge.survey import Survey, own_random_numbers, survey
from fxmerge.testing import assert_equivalent
from fxmerge.trials import TRIALS, best_near


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
    scorer: Scorer | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    executor: Executor | ExecutorName = "local",
    operators: Operators | None = None,
    tolerance: float = 0.03,
    corrections: int = 4,
    trials: int = TRIALS,
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
        scorer: what measures importance; None for :class:`fxmerge.Reconstruction`, which fits the weights in any case (the one in
            ``scorer.fit``, where there is one).
        store: a file where every measurement is kept as it is made (:class:`fxmerge.Store`); a run that died goes on from there,
            and ``fxmerge solve`` makes other plans from it.
        executor: where importance is measured: here, in processes of this machine, on a Ray cluster.
        operators: what is known of operators; None for the default table.
        tolerance: how far over the budget the measured latency may be, as a fraction of it.
        corrections: how often to measure, correct the budget and solve again.
        trials: how many plans within the budget are fitted, on a part of the calibration data, before one is taken; 0 takes the one
            that the tables say is best.
        progress: show bars on standard error.

    Returns:
        The merged network, its trainable student, the plan, the front and all tables.

    Raises:
        TraceError, InputError, NotFiniteError: the model, its inputs or an option cannot be used.
        CalibrationError: the calibration data cannot be used.
        NothingToMergeError: the network holds no convolution.
        BudgetError: no plan meets the budget; carries the fastest latency there is.
    """
    if objective not in get_args(Objective):
        raise InputError(f"objective must be one of {', '.join(get_args(Objective))}, found {objective!r}")
    if exact and (speedup, fraction, latency_ms) != (None, None, None):
        raise InputError("give exact=True, which takes whatever pays, or a budget; found both")
    budget = Budget() if exact else Budget.asked(speedup, fraction, latency_ms)
    _check_search(tolerance, corrections, trials)
    # What is made here is to be trained, wherever it is made; and the caller's random numbers are the caller's.
    with torch.inference_mode(False), opened(store) as kept, Bars(progress) as bars:
        found = survey(
            model,
            example_inputs,
            calibration=calibration,
            exact=exact,
            space=space,
            target=target,
            timer=timer,
            scorer=scorer,
            objective=objective,
            store=kept,
            executor=executor,
            operators=operators,
            bars=bars,
        )
        with own_random_numbers(found.target):
            search = Search(found, tolerance, timer, objective)
            weights: Mapping[str, Affine] = {}
            if exact:
                plan, measured = search.best_exact()
            else:
                tried = search.within(budget, corrections, bars("budget"))
                plan, measured, weights = best_near(search, tried, budget, fitter_of(scorer), bars("fit"), trials=trials)
            return build(found, search.front, plan, weights, measured)


def build(
    found: Survey, front: ParetoFront, plan: Plan, weights: Mapping[str, Affine], measured: tuple[Measurement, Measurement]
) -> Result:
    """Student and merged network of a plan, checked against each other, with all that led to them."""
    student, merged = build_networks(found.findings, plan, weights)
    assert_equivalent(student, merged, [found.arguments])
    return Result(
        model=merged,
        student=student,
        plan=plan,
        front=front,
        findings=found.findings,
        proposals=found.proposals,
        baseline=baseline(found.findings.graph, operators=found.findings.operators),
        latency=found.latency,
        importance=found.importance,
        measured=measured,
        example_inputs=found.arguments,
        weights=dict(weights),
    )


def _check_search(tolerance: float, corrections: int, trials: int) -> None:
    require_number("tolerance", tolerance, "a number from 0 on", lambda value: 0 <= value < math.inf)
    require_whole("corrections", corrections, 0)
    require_whole("trials", trials, 0)
