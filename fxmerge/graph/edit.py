"""Edits of graphs, each once: copy, put a module in, take a stretch out, tidy."""

from __future__ import annotations

import copy

from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxmerge.graph.meta import facts, record


def copied(graph: GraphModule) -> GraphModule:
    """A new GraphModule with a graph of its own that shares the leaf modules; editing it leaves the original intact."""
    twin = GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    twin.meta.update(graph.meta)
    return twin


def put_module(graph: GraphModule, target: str, module: nn.Module) -> None:
    """Store a module under a qualified name, in this graph only, creating the modules above it."""
    parent: nn.Module = graph
    *path, leaf = target.split(".")
    for atom in path:
        if not isinstance(getattr(parent, atom, None), nn.Module):
            parent.add_module(atom, nn.Module())
        parent = parent.get_submodule(atom)
    setattr(parent, leaf, module)


def free_target(graph: GraphModule, wanted: str) -> str:
    """A qualified module name like the one wanted that is not taken."""
    taken = {name for name, _ in graph.named_modules()}
    number = 0
    while (name := f"{wanted}_{number}" if number else wanted) in taken:
        number += 1
    return name


def call_module_after(graph: GraphModule, operand: Node, target: str, module: nn.Module, like: Node) -> Node:
    """Insert a call of a new module on ``operand``; its facts are those of the node ``like``."""
    put_module(graph, target, module)
    with graph.graph.inserting_before(like):
        node = graph.graph.call_module(target, (operand,))
    node.meta = dict(like.meta)
    record(node, target=target, role="", merge=None)
    return node


def bypass(node: Node, operand: Node) -> None:
    """Take a node out: its readers read the operand instead."""
    node.replace_all_uses_with(operand)
    node.graph.erase_node(node)


def erase(nodes: tuple[Node, ...]) -> None:
    """Erase nodes that only each other read, last first."""
    for node in reversed(nodes):
        node.graph.erase_node(node)


def tidy(graph: GraphModule) -> GraphModule:
    """Remove dead code and modules that nothing calls, check the graph and recompile it; returns the same object."""
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return graph


def shape_after(node: Node) -> tuple[int, ...]:
    """The recorded shape of a node's output.

    Raises:
        ValueError: none was recorded.
    """
    shape = facts(node).shape
    if shape is None:
        raise ValueError(f"no shape was recorded for {node.name}")
    return shape


__all__ = ["Graph", "bypass", "call_module_after", "copied", "erase", "free_target", "put_module", "shape_after", "tidy"]
