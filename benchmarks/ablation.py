"""The closed-form fit taken apart: top-1 of given plans, fitted with one part after the other; nothing is timed for it."""

from __future__ import annotations

import math

from tabulate import tabulate
from torch.fx import GraphModule

import fxmerge
from benchmarks.contest import METHODS, Contest, shifted
from benchmarks.networks import accuracy
from fxmerge.search import build_networks
from fxmerge.tune import calibration_tune

#: What the fit is made of, one part more in every row.
PARTS: dict[str, fxmerge.Reconstruction] = {
    "merges alone, in order": fxmerge.Reconstruction(through=0, stay=False),
    "+ through the activation": fxmerge.Reconstruction(stay=False),
    "+ layers that stay": fxmerge.Reconstruction(),
    "layers that stay, not through the activation": fxmerge.Reconstruction(through=0),
}
TUNED = ("merges alone, in order", "+ layers that stay")


def ablation(contest: Contest) -> str:
    """Of the plans of the speed-ups asked for, as predicted, fitted with one part after the other."""
    found, options = contest.survey(METHODS["fxmerge"]), contest.options
    front = found.study.front()
    plans = [front.plan(front.index(math.floor(front.original_ns / speedup))) for speedup in options.speedups]

    def top1(student: GraphModule) -> str:
        return f"{accuracy(fxmerge.fuse(student), contest.test, contest.test_labels):.2f}"

    def tuned(student: GraphModule) -> GraphModule:
        return calibration_tune(student, contest.graph, contest.calibration, steps=options.steps, augment=shifted)

    rows: list[list[str]] = []
    for label, scorer in PARTS.items():
        students = [build_networks(found.findings, plan, scorer.fit(found.findings, plan, found.batches))[0] for plan in plans]
        rows.append([label, *map(top1, students)])
        print(*rows[-1], flush=True)  # noqa: T201
        if options.steps and label in TUNED:
            rows.append([f"{label}, then tuned", *(top1(tuned(student)) for student in students)])
            print(*rows[-1], flush=True)  # noqa: T201
    heads = ("fit", *(f"{front.original_ns / (plan.latency_ns or 1):.2f}x predicted" for plan in plans))
    return tabulate(rows, heads, "github", disable_numparse=True)
