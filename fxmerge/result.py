"""What compressing gives, printed, saved and loaded again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule

from fxmerge.algebra.affine import Affine
from fxmerge.analysis.report import explain
from fxmerge.analysis.segments import Findings
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.segment import Proposal
from fxmerge.core.table import ImportanceTable, LatencyTable, Measurement
from fxmerge.errors import PlanError, PlanMismatchError
from fxmerge.graph.trace import trace
from fxmerge.measure.cost import cost
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import added_norms, linearize

PLAN, WEIGHTS, ABOUT, REPORT = "plan.json", "student.safetensors", "about.json", "report.txt"


@dataclass(frozen=True, eq=False)
class Result:
    """A compressed network and everything that led to it.

    Args:
        model: the merged network, for inference.
        student: the same function layer by layer, to be trained; ``fxmerge.fuse(student)`` merges it again.
        plan: what was merged.
        front: every plan that no other beats.
        findings: the traced graph, its segments and refusals.
        proposals: the candidates that were scored.
        baseline: the original with its batch norms folded.
        latency, importance: the tables.
        measured: end to end, timed in turn: the baseline, the merged network.
        example_inputs: what was measured with.
        weights: of the fitted merges, by candidate id, float64.
    """

    model: GraphModule
    student: GraphModule
    plan: Plan
    front: ParetoFront
    findings: Findings
    proposals: tuple[Proposal, ...]
    baseline: GraphModule
    latency: LatencyTable
    importance: ImportanceTable
    measured: tuple[Measurement, Measurement]
    example_inputs: tuple[Any, ...]
    weights: Mapping[str, Affine]

    def student_with_norms(self) -> GraphModule:
        """A student with a batch norm, an identity so far, behind every fitted convolution: what trains best.

        ``fxmerge.tune.calibrate_norms`` gives the norms their statistics; ``fxmerge.fuse`` folds them again.
        """
        return linearize(annotate(self.findings.graph, self.plan), weights=self.weights, norms=True)

    @property
    def speedup(self) -> float:
        """Measured, against the original with its batch norms folded."""
        return self.measured[0].median_ns / self.measured[1].median_ns

    @property
    def predicted_speedup(self) -> float:
        """What the tables said."""
        return self.front.original_ns / max(1, self.plan.latency_ns or self.front.original_ns)

    def report(self) -> str:
        """The outcome, the plan and the refusals as text."""
        original, merged = self.measured
        rows = []
        for name, network, measured in (("original, folded", self.baseline, original), ("merged", self.model, merged)):
            figures = cost(network, self.example_inputs)
            rows.append(
                (
                    name,
                    f"{measured.median_ns / 1e6:.3f} +- {measured.spread_ns / 2e6:.3f}",
                    f"{original.median_ns / measured.median_ns:.3f}x",
                    figures.convolutions,
                    figures.activations,
                    figures.parameters,
                    figures.flops,
                )
            )
        heads = ("network", "ms", "speed-up", "convolutions", "activations", "parameters", "FLOPs")
        refused = f"{len(self.findings.refusals)} refusals; fxmerge.explain(result.findings) prints them"
        return "\n\n".join(
            (
                tabulate(rows, headers=heads, disable_numparse=True),
                f"predicted {self.predicted_speedup:.3f}x, measured {self.speedup:.3f}x on {original.target}",
                explain(self.plan, latency=self.latency, importance=self.importance),
                refused,
            )
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write plan (JSON), the student's weights (safetensors) and the report; :func:`load` reads them back."""
        save_student(self.student, self.plan, self.example_inputs, directory, report=self.report())


@dataclass(frozen=True, eq=False)
class Loaded:
    """What :func:`load` read: the merged network, its student, the plan."""

    model: GraphModule
    student: GraphModule
    plan: Plan


def save_student(
    student: GraphModule, plan: Plan, example_inputs: Sequence[Any], directory: str | os.PathLike[str], *, report: str = ""
) -> None:
    """Write a student, trained or not, so that :func:`load` can make it again from the original model.

    Args:
        student: from :func:`fxmerge.linearize`.
        plan: what it was made with.
        example_inputs: of the network; their sizes are written, not their values.
        directory: made if need be.
        report: a text to put beside.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    norms = bool(added_norms(student))
    about = {"norms": norms, "inputs": [_described(value) for value in example_inputs]}
    scratch = folder / (WEIGHTS + ".part")
    save_model(student, str(scratch))
    scratch.replace(folder / WEIGHTS)
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(report + "\n", encoding="utf-8")
    plan.save(folder / PLAN)


def load(directory: str | os.PathLike[str], model: nn.Module, example_inputs: Any = None) -> Loaded:
    """Make student and merged network again from the original model and a saved folder. Nothing is unpickled.

    Args:
        directory: written by :meth:`Result.save` or :func:`save_student`.
        model: the original network, as it was compressed; its weights do not matter.
        example_inputs: to trace it with; None for zeros of the sizes saved.

    Raises:
        PlanError: a file is damaged or missing.
        PlanMismatchError: the plan or the weights belong to another model.
    """
    folder = Path(directory)
    try:
        plan = Plan.load(folder / PLAN)
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        inputs = tuple(map(_zeros, about["inputs"])) if example_inputs is None else example_inputs
        norms = bool(about["norms"])
    except FileNotFoundError as fault:
        raise PlanError(f"{fault.filename} is missing: {folder} was not written by fxmerge, or not to the end") from fault
    except (KeyError, TypeError, ValueError) as fault:
        if isinstance(fault, PlanError):
            raise
        raise PlanError(f"{folder / ABOUT} is damaged: {fault!r}") from fault
    graph = trace(model, inputs)
    student = linearize(annotate(graph, plan), norms=norms)
    try:
        load_model(student, str(folder / WEIGHTS))
    except FileNotFoundError as fault:
        raise PlanError(f"{folder / WEIGHTS} is missing") from fault
    except SafetensorError as fault:
        raise PlanError(f"{folder / WEIGHTS} is damaged: {fault}") from fault
    except RuntimeError as fault:
        raise PlanMismatchError(f"the weights in {folder} do not fit this model: {str(fault).splitlines()[0]}") from fault
    return Loaded(fuse(student), student, plan)


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return {"value": value if isinstance(value, (int, float, str, bool, type(None))) else None}


def _zeros(described: dict[str, Any]) -> Any:
    if "shape" not in described:
        return described["value"]
    return torch.zeros(described["shape"], dtype=getattr(torch, described["dtype"]))
