"""The second student of a plan: every merge as one convolution from the start, instead of layer by layer.

Layer by layer (the published way) is what :func:`fxmerge.linearize` makes of composed merges: activations gone, padding first,
norms kept; many layers stand for one convolution and are trained through each other. Merged already, with a norm behind each
convolution, the student is trained as it will run: fewer layers, faster steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch.fx import GraphModule

from fxmerge.algebra.affine import Affine, evaluate, evaluate_sides
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate
from fxmerge.operators import Operators, default_operators, read_expression, read_maps
from fxmerge.passes.annotate import annotate, merges, stretch
from fxmerge.passes.linearize import linearize


def already_merged(
    graph: GraphModule, plan: Plan, *, weights: Mapping[str, Affine] | None = None, operators: Operators | None = None
) -> tuple[Plan, dict[str, Affine]]:
    """The plan whose composed merges are one convolution from the start, and what those compute.

    Args:
        graph: the traced graph that the plan was made for.
        plan: its composed merges become fitted ones of the same geometry; but for those that take a tensor from outside.
        weights: of the fitted merges that it has already, by id.
        operators: what was known of operators when the plan was made; None for the default table.

    Returns:
        The plan, and weights by candidate id, float64: ``linearize(annotate(graph, plan), weights=weights, norms=True)`` computes
        what the student of the plan given does.
    """
    table = operators or default_operators()
    student = linearize(annotate(graph, plan), weights=weights or {}, operators=table).eval()
    verdicts = table.verdicts(student)
    made: dict[Candidate, Candidate] = {}
    known = dict(weights or {})
    for exit_node, merge in merges(student):
        if merge.kind != "composed":
            continue
        entry, nodes = stretch(student, exit_node, merge)
        expression, maps = read_expression(entry, nodes, verdicts), read_maps(student, nodes, verdicts, table)
        if evaluate_sides(expression, maps):
            continue
        made[merge] = replace(merge, kind="fitted", removed=())
        known[made[merge].id] = evaluate(expression, maps)
    return replace(plan, merges=tuple(made.get(merge, merge) for merge in plan.merges)), known
