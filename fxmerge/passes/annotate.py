"""Write a plan's decisions on the nodes of a graph. The only writer of roles; linearize and fuse read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate
from fxmerge.errors import PlanMismatchError
from fxmerge.graph.edit import copied
from fxmerge.graph.meta import facts, origin, record
from fxmerge.graph.query import between, fingerprint, node_named
from fxmerge.passes.base import Pass


@dataclass(frozen=True)
class Annotate(Pass):
    """Annotate a graph with a plan: the graph that the plan was made for, or a student made from it."""

    plan: Plan
    exact: ClassVar[bool] = True

    def requires(self, graph: GraphModule) -> None:
        found = origin(graph) or fingerprint(graph)
        if found != self.plan.fingerprint:
            raise PlanMismatchError(
                f"this plan was made for a graph with fingerprint {self.plan.fingerprint[:12]}, this graph has {found[:12]}. "
                "Trace the same model in the same way, or make a plan for this one."
            )

    def call(self, graph: GraphModule) -> GraphModule:
        annotated = copied(graph)
        for node in annotated.graph.nodes:
            record(node, role="", merge=None)
        student = origin(graph) is not None
        for merge in self.plan.merges:
            _write(annotated, merge, student)
        return annotated


def annotate(graph: GraphModule, plan: Plan) -> GraphModule:
    """A copy of a graph with a plan's decisions written on its nodes.

    Args:
        graph: the traced graph that the plan was made for, or a student of it (then the plan can be fused again).
        plan: from :meth:`ParetoFront.pick`, or loaded.

    Raises:
        PlanMismatchError: the plan was made for another graph.
    """
    return Annotate(plan).apply(graph)


def merges(graph: GraphModule) -> Iterator[tuple[Node, Candidate]]:
    """The exit of every merge that is written on a graph, and the merge, in graph order."""
    for node in graph.graph.nodes:
        merge = facts(node).merge
        if merge is not None:
            yield node, merge


def stretch(graph: GraphModule, exit_node: Node, merge: Candidate) -> tuple[Node, tuple[Node, ...]]:
    """The entry of a merge, and the nodes from behind it to its exit, in graph order."""
    entry = _node(graph, merge.entry)
    return entry, between(entry, exit_node)


def _write(graph: GraphModule, merge: Candidate, student: bool) -> None:
    exit_node = _node(graph, merge.exit)
    entry, inside = stretch(graph, exit_node, merge)
    gone = set(merge.activations) | set(merge.removed)
    if not student:
        for name in gone:
            _node(graph, name)
        _check_fits(merge, entry, inside)
    for node in inside:
        if facts(node).role:
            raise PlanMismatchError(f"merges overlap at {node.name}: a plan covers every node once", node=node.name)
        if merge.kind != "composed" and not student:
            record(node, role="replaced")
        else:
            record(node, role="removed" if node.name in gone else "merged")
    record(exit_node, merge=merge)


def _check_fits(merge: Candidate, entry: Node, inside: tuple[Node, ...]) -> None:
    """A merge must lie between its entry and its exit, and give a tensor of the shape that is there."""
    exit_node = inside[-1]
    before, after = facts(entry).shape or (), facts(exit_node).shape or ()
    strangers = (set(merge.activations) | set(merge.removed)) - {node.name for node in inside}
    connected = any(entry in node.all_input_nodes for node in inside)
    geometry = merge.geometry
    shaped = (
        len(before) == len(after) == len(geometry.axes) + 2
        and (before[1], after[1]) == (geometry.in_channels, geometry.out_channels)
        and geometry.outputs(before[2:]) == after[2:]
    )
    if strangers or not connected or not shaped:
        what = f"{', '.join(sorted(strangers))} is not inside" if strangers else f"{before} to {after} is not {geometry}"
        raise PlanMismatchError(f"the merge {merge.id} does not fit the graph: {what}", node=exit_node.name)


def _node(graph: GraphModule, name: str) -> Node:
    node = node_named(graph, name)
    if node is None:
        raise PlanMismatchError(f"the plan names node {name!r}, and this graph has none of that name", node=name)
    return node
