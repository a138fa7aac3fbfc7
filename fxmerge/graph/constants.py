"""Tensors that do not depend on the network's inputs: parameters, and what is computed from them alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxmerge.graph.meta import facts, record
from fxmerge.graph.query import attribute


def mark_constants(graph: GraphModule) -> None:
    """Record on every node that computes something from parameters alone that it does."""
    constant: set[Node] = set()
    for node in graph.graph.nodes:
        operands = node.all_input_nodes
        computed = node.op.startswith("call_") and operands and all(operand in constant for operand in operands)
        if node.op == "get_attr" or computed:
            constant.add(node)
        if computed != facts(node).constant:
            record(node, constant=bool(computed))


def is_constant(value: object) -> bool:
    """Whether this is a node whose value does not depend on the inputs."""
    return isinstance(value, Node) and (value.op == "get_attr" or facts(value).constant)


def constant_value(graph: GraphModule, value: Any) -> Any:
    """The value of a constant node, computed now; anything that is no node as it is."""
    if not isinstance(value, Node):
        return value
    if value.op == "get_attr":
        return attribute(graph, str(value.target))
    args, kwargs = map_arg((value.args, value.kwargs), lambda node: constant_value(graph, node))
    with torch.no_grad():
        if value.op == "call_module":
            return graph.get_submodule(str(value.target))(*args, **kwargs)
        if value.op == "call_method":
            return getattr(args[0], str(value.target))(*args[1:], **kwargs)
        assert callable(value.target)
        return value.target(*args, **kwargs)


def leaves(value: Node) -> Iterable[str]:
    """The qualified names of the parameters and buffers that a constant node is computed from."""
    if value.op == "get_attr":
        yield str(value.target)
    for operand in value.all_input_nodes:
        yield from leaves(operand)
