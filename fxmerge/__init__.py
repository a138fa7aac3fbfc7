"""Make a trained convolutional network faster by making it shallower.

    result = fxmerge.compress(model, example_inputs, speedup=1.5, calibration=images)
    result.model, result.student, result.plan, result.front, result.report(), result.save("out")

or verb by verb; each arrow is one public function, each noun can be printed, plans can be saved:

    nn.Module --trace--> GraphModule --find_segments--> Findings --propose--> Proposals
      --measure_latency, measure_importance--> tables --solve--> ParetoFront --pick--> Plan
      --annotate--> annotated graph --linearize--> student (weights from fit; trained if wanted) --fuse--> merged GraphModule

The rooms, in the order in which they may import each other (those on one level do not see each other):

    errors      one small tree of exceptions
    core        the nouns: geometry, expression, segment, region, table, plan; no torch.fx
    algebra     affine maps with their numbers; least squares; tensors only
    graph       every torch.fx idiom, once: capture, one dialect (spelling, activations, modules, slices, layout), query, edit
    solve       tree + tables -> Pareto front; integers, no torch      budget   what may remain, as people say it
    operators   what is known of each operator of torch: what it is, its numbers, how it runs without padding
    analysis    graph -> facts: cuts, segments, candidates, reports; edits nothing
    passes      graph -> graph, one per file; none changes its input
    measure     latency, importance by scorers, weights from data; where it runs (executors) and is kept (store)
    tune        the student brought back to the original, on calibration images or by training
    survey      from a model to its two tables      search      from tables and a budget to a plan that meets it, measured
    compress, result              the story, its outcome
    saved, testing                students on disk; the proof      interchange     tables of others' format
    stand_in                      a merged network in its model's place
    backend, cli, demo            the doors      data, quick_noise   images on disk, quick initialisation, for the CLI
"""

from __future__ import annotations

from fxmerge import tune
from fxmerge._version import __version__
from fxmerge.analysis.candidates import Space, propose
from fxmerge.analysis.plot import plot_front
from fxmerge.analysis.report import explain
from fxmerge.analysis.segments import Findings, find_segments
from fxmerge.compress import compress
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.resource import Resource
from fxmerge.core.segment import Candidate, Proposal, Reason, Refusal, Segment
from fxmerge.core.table import Importance, ImportanceTable, LatencyTable, Measurement, Target
from fxmerge.errors import (
    BudgetError,
    CalibrationError,
    FxMergeError,
    InputError,
    MeasurementError,
    NotEquivalentError,
    NotFiniteError,
    NothingToMergeError,
    PassError,
    PlanError,
    PlanMismatchError,
    StoreError,
    TableError,
    TraceError,
    WorkerError,
)
from fxmerge.graph.trace import trace
from fxmerge.interchange import read_depth_tables, read_published, write_published
from fxmerge.measure.calibration import as_batches
from fxmerge.measure.diffusion import NoisePrediction, TimeShares
from fxmerge.measure.executors import Executor, Local, Processes, Ray
from fxmerge.measure.finetuning import Custom, FineTuning
from fxmerge.measure.latency import baseline, measure_latency, worthwhile
from fxmerge.measure.reconstruction import Reconstruction, fit
from fxmerge.measure.recorded import recorded_inputs
from fxmerge.measure.resources import count_resource
from fxmerge.measure.scoring import Scorer, measure_importance
from fxmerge.measure.store import Store
from fxmerge.measure.timer import InterleavedTimer, Timed, Timer, compare
from fxmerge.operators import Operators, default_operators
from fxmerge.passes.annotate import Annotate, annotate
from fxmerge.passes.base import Pass, Sequential
from fxmerge.passes.drop_repeated import DropRepeated
from fxmerge.passes.fold_batchnorm import FoldBatchNorm
from fxmerge.passes.fuse_segments import FuseSegments, fuse
from fxmerge.passes.linearize import Linearize, linearize
from fxmerge.passes.reuse_memory import ReuseMemory
from fxmerge.result import Result
from fxmerge.saved import Loaded, load, save_student
from fxmerge.solve.frontier import solve_tables as solve
from fxmerge.stand_in import in_place_of

__all__ = [
    "Annotate",
    "BudgetError",
    "CalibrationError",
    "Candidate",
    "Custom",
    "DropRepeated",
    "Executor",
    "Findings",
    "FineTuning",
    "FoldBatchNorm",
    "FuseSegments",
    "FxMergeError",
    "Importance",
    "ImportanceTable",
    "InputError",
    "InterleavedTimer",
    "LatencyTable",
    "Linearize",
    "Loaded",
    "Local",
    "Measurement",
    "MeasurementError",
    "NoisePrediction",
    "NotEquivalentError",
    "NotFiniteError",
    "NothingToMergeError",
    "Operators",
    "ParetoFront",
    "Pass",
    "PassError",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "Processes",
    "Proposal",
    "Ray",
    "Reason",
    "Reconstruction",
    "Refusal",
    "Resource",
    "Result",
    "ReuseMemory",
    "Scorer",
    "Segment",
    "Sequential",
    "Space",
    "Store",
    "StoreError",
    "TableError",
    "Target",
    "TimeShares",
    "Timed",
    "Timer",
    "TraceError",
    "WorkerError",
    "__version__",
    "annotate",
    "as_batches",
    "baseline",
    "compare",
    "compress",
    "count_resource",
    "default_operators",
    "explain",
    "find_segments",
    "fit",
    "fuse",
    "in_place_of",
    "linearize",
    "load",
    "measure_importance",
    "measure_latency",
    "plot_front",
    "propose",
    "read_depth_tables",
    "read_published",
    "recorded_inputs",
    "save_student",
    "solve",
    "trace",
    "tune",
    "worthwhile",
    "write_published",
]
