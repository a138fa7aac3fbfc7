"""A stretch of a graph as a module of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from fxmerge.graph.edit import shape_after
from fxmerge.graph.meta import facts, record
from fxmerge.graph.query import attribute, describe_module, is_tensor, module_of


def extract(graph: GraphModule, nodes: Sequence[Node]) -> tuple[GraphModule, tuple[tuple[int, ...], ...]]:
    """A GraphModule that computes just these nodes, sharing their modules.

    Args:
        graph: the whole.
        nodes: in graph order.

    Returns:
        The module; its inputs are the tensors that the nodes read from elsewhere, its outputs those that are read elsewhere.
        And the shapes of its inputs.
    """
    wanted = _with_constants(nodes)
    inside = set(wanted)
    part = Graph()
    twins: dict[Node, Node] = {}
    shapes = []
    for node in wanted:
        for operand in node.all_input_nodes:
            if operand not in inside and operand not in twins:
                twins[operand] = part.placeholder(f"x{len(twins)}")
                record(twins[operand], shape=facts(operand).shape, dtype=facts(operand).dtype)
                shapes.append(shape_after(operand))
    for node in wanted:
        twins[node] = part.node_copy(node, twins.__getitem__)
    read = tuple(twins[node] for node in nodes if any(user not in inside for user in node.users))
    part.output(read[0] if len(read) == 1 else read)
    return GraphModule(graph, part), tuple(shapes)


def _with_constants(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, and before each of them the parameters and sizes that it reads and what those are computed from."""
    wanted: dict[Node, None] = {}
    waiting = list(reversed(nodes))
    inside = set(nodes)
    while waiting:
        node = waiting[-1]
        missing = [o for o in node.all_input_nodes if o not in wanted and o not in inside and not is_tensor(o)]
        if missing:
            waiting.extend(missing)
        else:
            wanted[waiting.pop()] = None
    return list(wanted)


def signature(part: GraphModule, shapes: Sequence[tuple[int, ...]]) -> str:
    """A text that two extracted modules share iff they do the same work: operations, settings and sizes, no names, no weights.

    Types are told of inputs and constants that are no floating-point numbers; those that are take the type of the target.
    """
    number = {node: index for index, node in enumerate(part.graph.nodes)}

    def plain(value: object) -> str:
        if isinstance(value, Node):
            return f"%{number[value]}"
        if isinstance(value, (tuple, list)):
            return f"({' '.join(map(plain, value))})"
        if isinstance(value, dict):
            return " ".join(f"{key}={plain(item)}" for key, item in value.items())
        return repr(value)

    lines = []
    for node in part.graph.nodes:
        module = module_of(part, node)
        if node.op == "placeholder" and _type(facts(node).dtype):
            lines.append(f"%{number[node]} is{_type(facts(node).dtype)}")
        if node.op == "get_attr":
            lines.append(_constant(attribute(part, str(node.target))))
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))
        what = describe_module(module) if module is not None else name
        lines.append(f"{what} {plain(node.args)} {plain(node.kwargs)}".strip())
    return "; ".join(lines) + f" @ {' '.join('x'.join(map(str, shape)) for shape in shapes)}"


def _constant(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return f"get_attr {type(value).__name__}"
    return f"get_attr {tuple(value.shape)}{_type(value.dtype)}"


def _type(dtype: torch.dtype | None) -> str:
    return "" if dtype is None or dtype.is_floating_point else f" {dtype}".replace("torch.", "")
