"""What compressing gives, printed and saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule

from fxmerge.algebra.affine import Affine
from fxmerge.analysis.report import explain
from fxmerge.analysis.segments import Findings
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.segment import Proposal
from fxmerge.core.table import ImportanceTable, LatencyTable, Measurement
from fxmerge.measure.cost import cost
from fxmerge.passes.annotate import annotate
from fxmerge.passes.linearize import linearize
from fxmerge.saved import save_student
from fxmerge.stand_in import in_place_of


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
        weights: of the merges, by name of the candidate or of a part of it, float64.
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
        annotated, operators = annotate(self.findings.graph, self.plan), self.findings.operators
        return linearize(annotated, weights=self.weights, norms=True, operators=operators)

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

    def in_place_of(self, model: nn.Module) -> nn.Module:
        """The merged network behind the call and the attributes of the model that was compressed; see :func:`in_place_of`.

        ``pipeline.unet = result.in_place_of(pipeline.unet)``
        """
        return in_place_of(model, self.model, self.example_inputs)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the student's weights with the plan (safetensors), the plan alone (JSON), the report; :func:`load` reads them."""
        save_student(self.student, self.plan, self.example_inputs, directory, report=self.report())
