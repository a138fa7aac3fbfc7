"""The closed-form fit taken apart: top-1 of the plans taken, fitted with one part after the other; nothing more is timed for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule

import fxmerge
from benchmarks.contest import METHODS, Contest, shifted
from benchmarks.networks import accuracy
from benchmarks.rivals import with_statistics
from fxmerge.core.plan import Plan
from fxmerge.graph.query import module_of
from fxmerge.search import build_networks
from fxmerge.tune import calibration_tune

#: What the fit is made of, one part more in every row; then what is left out of it, or otherwise than by default.
PARTS: dict[str, fxmerge.Reconstruction] = {
    "merges alone, in order": fxmerge.Reconstruction(through=0, stay=False),
    "+ through the activation": fxmerge.Reconstruction(stay=False),
    "+ layers that stay": fxmerge.Reconstruction(),
    "layers that stay, not through the activation": fxmerge.Reconstruction(through=0),
    "a ridge of a hundredth": fxmerge.Reconstruction(ridge=1e-6),
    "a ridge a hundred times as large": fxmerge.Reconstruction(ridge=1e-2),
}
WHOLE = "+ layers that stay"
TUNED = ("merges alone, in order", WHOLE)


def ablation(contest: Contest) -> str:
    """Of the plans taken for the speed-ups asked for, fitted with one part after the other; and of plans near them."""
    found, options = contest.survey(METHODS["fxmerge"]), contest.options
    starts = [start for speedup in options.speedups if (start := contest.start("fxmerge", speedup)).can]
    taken = [contest.plan_of(start) for start in starts]
    front = found.study.front()
    rows: list[list[str]] = []

    def top1(student: GraphModule) -> str:
        return f"{accuracy(fxmerge.fuse(student), contest.test, contest.test_labels):.2f}"

    def tuned(student: GraphModule) -> GraphModule:
        return calibration_tune(student, contest.graph, contest.calibration, steps=options.steps, augment=shifted)

    def with_norms(plan: Plan) -> GraphModule:
        """What stays keeps its weights; its norms get the statistics that the student has."""
        weights = fxmerge.Reconstruction(stay=False).fit(found.findings, plan, found.batches)
        return with_statistics(fxmerge.linearize(fxmerge.annotate(contest.graph, plan), weights=weights), contest.calibration)

    def add(label: str, plans: Sequence[Plan], scorer: fxmerge.Reconstruction, *, also_tuned: bool = False) -> None:
        students = [build_networks(found.findings, plan, scorer.fit(found.findings, plan, found.batches))[0] for plan in plans]
        rows.append([label, *map(top1, students)])
        if also_tuned:
            rows.append([f"{label}, then tuned", *(top1(tuned(student)) for student in students)])
        for row in rows[-1 - also_tuned :]:
            print(*row, flush=True)  # noqa: T201

    classifiers = tuple(node.name for node in contest.graph.graph.nodes if type(module_of(contest.graph, node)) is nn.Linear)
    parts = {**PARTS, "through the activation, and of what stays the last linear layer": fxmerge.Reconstruction(stay=classifiers)}
    for label, scorer in parts.items():
        add(label, taken, scorer, also_tuned=bool(options.steps) and label in TUNED)
    rows.append(["through the activation, and the statistics of the norms", *(top1(with_norms(plan)) for plan in taken)])
    alone = [front.plan(front.index(plan.latency_ns or front.original_ns)) for plan in taken]
    add("the plan of least summed loss, as fast by the tables", alone, PARTS[WHOLE])
    behind = [_with_activations(plan, contest.findings, options.groups) for plan in taken]
    if behind != taken:
        add("activations put behind merges that end in none", behind, PARTS[WHOLE])
    heads = ("fit", *(f"{start.about['speedup']:.2f}x measured" for start in starts))
    return tabulate(rows, heads, "github", disable_numparse=True)


def _with_activations(plan: Plan, findings: fxmerge.Findings, groups: Sequence[int]) -> Plan:
    """The plan with an activation behind every merge that can have one and has none."""
    offered = [c for p in fxmerge.propose(findings, fxmerge.Space(added=True, groups=groups)) for c in p.candidates]
    twins = {replace(candidate, added="").id: candidate for candidate in offered if candidate.added}
    return replace(plan, merges=tuple(twins.get(merge.id, merge) for merge in plan.merges))
