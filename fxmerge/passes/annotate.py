"""Write a plan's decisions on the nodes of a graph. The only writer of roles; linearize and fuse read them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, GraphModule, Node

from fxmerge.core.geometry import Geometry
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate
from fxmerge.errors import PlanMismatchError
from fxmerge.graph.edit import copied
from fxmerge.graph.meta import facts, origin, record
from fxmerge.graph.query import acts_alike, between, data_operands, fingerprint, tensor_named
from fxmerge.passes.base import Pass

#: Pixels that a kernel may reach over the border of an image; more is a damaged plan, and would not fit into memory.
_FARTHEST = 1024


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
        if not self.plan.merges and not any(facts(node).role or facts(node).merge for node in graph.graph.nodes):
            return graph
        annotated = copied(graph)
        for node in annotated.graph.nodes:
            record(node, role="", merge=None)
        student = origin(graph) is not None
        for merge in self.plan.merges:
            _write(annotated, merge, student)
        return annotated


def annotate(graph: GraphModule, plan: Plan) -> GraphModule:
    """A copy of a graph with a plan's decisions written on its nodes; the graph itself where there is nothing to write.

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
    entry = tensor_named(graph, merge.entry) or _node(graph, merge.entry)
    return entry, between(entry, exit_node)


def _write(graph: GraphModule, merge: Candidate, student: bool) -> None:
    exit_node = _node(graph, merge.exit)
    entry, inside = stretch(graph, exit_node, merge)
    gone = set(merge.activations) | set(merge.removed)
    if not student:
        for name in (*gone, *merge.norms, *merge.sides):
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
    """A merge must be all that lies between its entry and its exit, and give a tensor of the shape that is there."""
    fault = _not_closed(merge, entry, inside) or _misended(merge, inside[-1]) or _misshapen(merge, entry, inside[-1])
    fault = fault or _wrongly_added(merge, inside)
    if fault:
        raise PlanMismatchError(f"the merge {merge.id} does not fit the graph: {fault}", node=merge.exit)


def _not_closed(merge: Candidate, entry: Node, inside: tuple[Node, ...]) -> str:
    """What keeps these nodes from being a stretch with one entry and one exit; empty where nothing does."""
    members = {entry, *inside}
    if not any(entry in node.all_input_nodes for node in inside):
        return f"{merge.exit} does not depend on {merge.entry}"
    moved = {merge.moved} - {""}
    strangers = sorted((set(merge.activations) | set(merge.removed) | set(merge.norms) | moved) - {node.name for node in inside})
    if strangers:
        return f"{', '.join(strangers)} is not inside"
    sides: set[str] = set()
    for node in inside:
        outside = [operand for operand in data_operands(node) if operand not in members]
        if outside and not is_side(node, outside):
            return f"{node.name} reads {outside[0].name}, which is outside"
        sides |= {operand.name for operand in outside}
        readers = [user for user in node.users if user not in members]
        if readers and node is not inside[-1]:
            return f"{readers[0].name}, which is outside, reads {node.name}"
    unknown = sorted(sides ^ set(merge.sides)) if merge.kind == "fitted" else ()
    return f"{unknown[0]} is added inside, or is no side input" if unknown else ""


def is_side(node: Node, operands: Sequence[Node]) -> bool:
    """Whether these are the one operand that a node adds to all pixels of another alike."""
    shape = facts(operands[0]).shape or ()
    return node.target is operator.add and list(operands) == [node.args[1]] and len(shape) > 2 and set(shape[2:]) == {1}


def _misended(merge: Candidate, exit_node: Node) -> str:
    """Whether something else than what is kept, one node after the other, leads from the exit to the end; empty where not."""
    node = _named(exit_node.graph, merge.end)
    while node is not exit_node:
        operands = data_operands(node)
        if len(operands) != 1:
            return f"{merge.exit} does not lead to {merge.end} alone"
        node = operands[0]
    return ""


def _wrongly_added(merge: Candidate, inside: tuple[Node, ...]) -> str:
    """What speaks against the activation that is put behind the exit; empty where nothing does."""
    if not merge.added:
        return ""
    if merge.added not in merge.activations or merge.kind == "identity" or merge.moved:
        return f"{merge.added} is to stand behind one convolution, but is not removed, or something else stands there"
    if merge.end != merge.exit:
        return f"{merge.added} is to stand behind {merge.exit}, where {merge.end} is kept"
    [node] = [node for node in inside if node.name == merge.added]
    owner = node.graph.owning_module
    fits = owner is not None and acts_alike(owner, node)
    return "" if fits else f"{merge.added} has numbers of its own, or reads several tensors, so it cannot stand behind {merge.exit}"


def _misshapen(merge: Candidate, entry: Node, exit_node: Node) -> str:
    """How the shapes of entry and exit are not those of the merge's geometry; empty where they are."""
    before, after, geometry = facts(entry).image_shape, facts(exit_node).image_shape, merge.geometry
    if merge.kind == "identity" and geometry != Geometry.identity(geometry.in_channels, len(geometry.axes)):
        return f"{geometry} is no identity"
    fits = (
        len(before) == len(after) == len(geometry.axes) + 2
        and (before[1], after[1]) == (geometry.in_channels, geometry.out_channels)
        and geometry.outputs(before[2:]) == after[2:]
        and all(-size < min(pads) and max(pads) <= _FARTHEST for pads, size in zip(geometry.padding, before[2:], strict=True))
    )
    return "" if fits else f"{before} to {after} is not {geometry}"


def _node(graph: GraphModule, name: str) -> Node:
    return _named(graph.graph, name)


def _named(graph: Graph, name: str) -> Node:
    node: Node | None = next((node for node in graph.nodes if node.name == name), None)
    if node is None:
        raise PlanMismatchError(f"the plan names node {name!r}, and this graph has none of that name", node=name)
    return node
