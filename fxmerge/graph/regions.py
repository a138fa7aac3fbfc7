"""Regions: stretches that torch.export and TorchDynamo write as one node around a graph of their own.

What runs under checkpoint, without gradients, or under an autocast that casts nothing, computes what it would compute by itself: it
is put in the node's place (:func:`inline_regions`). Any other region stays one node; :func:`inside` tells what it holds.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg
from torch.utils import _pytree as pytree

from fxmerge.graph.activations import ACTIVATIONS
from fxmerge.graph.edit import bypass
from fxmerge.graph.modules import LAYERS
from fxmerge.graph.names import is_layer, module_path
from fxmerge.graph.query import attribute
from fxmerge.graph.spelling import name_of

_AUTOCAST = "wrap_with_autocast"
#: Regions that compute what is in them and nothing else; what is in them reads the last of their operands.
_PLAIN = ("wrap_with_set_grad_enabled", "tag_activation_checkpoint", "invoke_subgraph")
_MARKS = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
_LAYERS = LAYERS | ACTIVATIONS.keys()


def gather_autocast(graph: GraphModule) -> GraphModule:
    """TorchDynamo's graphs mark where autocast begins and ends; here that becomes a region, as torch.export has it.

    Nothing else keeps the marks in their places.
    """
    if not any(node.target in _MARKS for node in graph.graph.nodes):
        return graph
    from torch._export.passes.replace_autocast_with_hop_pass import replace_autocast_with_hop_pass

    for node in graph.graph.nodes:
        if "example_value" in node.meta:  # as TorchDynamo calls what torch.export calls val
            node.meta.setdefault("val", node.meta["example_value"])
    return replace_autocast_with_hop_pass(graph, None)[0]


def inline_regions(graph: GraphModule) -> None:
    """Put what regions compute in their places, in place, where it computes the same there."""
    waiting = list(graph.graph.nodes)
    while waiting:
        node = waiting.pop()
        held = _holders(graph, node)
        if len(held) == 1 and _changes_nothing(graph, node, *held.values()):
            waiting += _inline(graph, node, *held.items())
    graph.recompile()


def inside(graph: GraphModule, node: Node) -> Iterator[Node]:
    """Every node that a region runs, those of the regions in it too; none where the node is no region."""
    for body in _holders(graph, node).values():
        for inner in body.graph.nodes:
            yield inner
            yield from inside(body, inner)


def layers_inside(graph: GraphModule, node: Node) -> Iterator[tuple[Node, str]]:
    """The convolutions, linear layers, norms and activations that a region runs, each with its name in the model."""
    for inner in inside(graph, node):
        if inner.op.startswith("call_") and name_of(inner) in _LAYERS:
            yield inner, (is_layer(inner) and module_path(inner)) or name_of(inner)


def bodies(graph: GraphModule) -> Iterator[GraphModule]:
    """The graphs of all regions of a graph, those in regions too."""
    for node in graph.graph.nodes:
        for body in _holders(graph, node).values():
            yield body
            yield from bodies(body)


def _holders(graph: GraphModule, node: Node) -> dict[Node, GraphModule]:
    """The operands of a region that are graphs, by the nodes that read them."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return {}
    held = {operand: attribute(graph, str(operand.target)) for operand in node.all_input_nodes if operand.op == "get_attr"}
    return {operand: value for operand, value in held.items() if isinstance(value, GraphModule)}


def _changes_nothing(graph: GraphModule, node: Node, body: GraphModule) -> bool:
    """Whether a region's graph computes outside of it what it computes in it."""
    name = str(getattr(node.target, "__name__", ""))
    return name in _PLAIN or (name == _AUTOCAST and _casts_nothing(graph, node, body))


def _casts_nothing(graph: GraphModule, node: Node, body: GraphModule) -> bool:
    """Autocast leaves float64 alone, and what has the type to cast to; what it casts in spite of that shows in its result."""
    device, dtype, enabled = node.args[:3]
    if not enabled:
        return True
    values = [_value(graph, operand) for operand in node.all_input_nodes]
    values += [_value(body, inner) for inner in body.graph.nodes if inner.op not in ("placeholder", "output")]
    found = {leaf.dtype for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
    wanted = dtype if dtype is not None else torch.get_autocast_dtype(str(device))
    return all(value is not None for value in values) and len(found) == 1 and found <= {wanted, torch.float64}


def _value(graph: GraphModule, node: Node) -> Any:
    """What stood for a node's value when it was captured; None where that is not known."""
    return attribute(graph, str(node.target)) if node.op == "get_attr" else node.meta.get("val", node.meta.get("example_value"))


def _inline(graph: GraphModule, node: Node, held: tuple[Node, GraphModule]) -> list[Node]:
    """Put a region's graph in its place; returns the nodes that came in."""
    holder, body = held
    holders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    twins: dict[Node, Argument] = dict(zip(holders, node.args[len(node.args) - len(holders) :], strict=True))
    made, given = [], None
    with graph.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "output":
                given = map_arg(inner.args[0], twins.__getitem__)
            elif inner.op != "placeholder":
                twin = graph.graph.node_copy(inner, twins.__getitem__)
                if twin.op in ("get_attr", "call_module"):
                    twin.target = f"{holder.target}.{inner.target}"
                twins[inner] = twin
                made.append(twin)
    _read_instead(node, given)
    if not holder.users:
        graph.graph.erase_node(holder)
    return made


def _read_instead(node: Node, given: Argument) -> None:
    """Let who reads a region, or an item of what it gives, read this."""
    for reader in list(node.users):
        if reader.target is operator.getitem and isinstance(given, (tuple, list)):
            bypass(reader, given[reader.args[1]])  # type: ignore[index]
    bypass(node, given)
