"""From a stretch of a graph to the expression it computes, and to its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import GraphModule, Node

from fxmerge.algebra.affine import Affine
from fxmerge.core.expression import Expression, Step
from fxmerge.core.geometry import Geometry
from fxmerge.graph.meta import facts
from fxmerge.operators.base import Activation, Join, Map, Norm, Operators, Site, Verdict


def read_expression(entry: Node, nodes: Sequence[Node], verdicts: Mapping[Node, Verdict]) -> Expression:
    """What a stretch computes from ``entry``, its activations taken for identities, a scale and a shift for each norm.

    Args:
        entry: the tensor that enters.
        nodes: the stretch in graph order, the exit last; affine nodes, activations and norms only.
        verdicts: of (at least) these nodes.
    """
    shape = facts(entry).image_shape
    steps = [Step(entry.name, "entry", (), Geometry.identity(shape[1], len(shape) - 2))]
    index = {entry: 0}
    for node in nodes:
        verdict = verdicts[node]
        if isinstance(verdict, Join):
            steps.append(Step(node.name, verdict.kind, tuple(index[operand] for operand in verdict.operands)))
        elif isinstance(verdict, Map):
            side = verdict.side.name if verdict.side is not None else ""
            steps.append(Step(node.name, "apply", (index[_first(node)],), verdict.geometry, verdict.role, side))
        elif isinstance(verdict, Norm):
            steps.append(Step(node.name, "apply", (index[_first(node)],), verdict.geometry, "norm"))
        elif isinstance(verdict, Activation):
            index[node] = index[_first(node)]
            continue
        else:
            raise ValueError(f"{node.name} is opaque ({verdict.detail})")
        index[node] = len(steps) - 1
    return Expression(tuple(steps[: index[nodes[-1]] + 1]))


def _first(node: Node) -> Node:
    operand = node.args[0]
    assert isinstance(operand, Node)
    return operand


def read_maps(graph: GraphModule, nodes: Sequence[Node], verdicts: Mapping[Node, Verdict], table: Operators) -> dict[str, Affine]:
    """The numbers of every map among these nodes, by node name."""
    maps = {}
    for node in nodes:
        operator = table.find(graph, node)
        if isinstance(verdicts[node], Map) and operator is not None:
            maps[node.name] = operator.affine(Site(graph, node))
    return maps
