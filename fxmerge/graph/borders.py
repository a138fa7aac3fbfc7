"""A pad whose border is then overwritten with one constant for each channel becomes shift, zero pad, shift back.

    padded = F.pad(x, (p, p, p, p));  padded[:, :, :p] = v;  padded[:, :, -p:] = v;  ...   =   F.pad(x - v, (p, p, p, p)) + v

So do the training forms that pad a normalised image with what the norm makes of zero (Ding, Zhang, Han, Ding 2021, "Diverse
Branch Block"), to be one convolution in the end.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxmerge.graph.constants import constant_value, is_constant
from fxmerge.graph.meta import facts, record
from fxmerge.graph.spelling import read_call

_WHOLE = slice(None, None, None)
_LAST = 1 << 62  # where ATen means "to the end"


@dataclass(frozen=True)
class _Write:
    """One write into a padded tensor: the dimension and slice written to, what is written, and the nodes that do it, last first."""

    edge: tuple[int, slice] | None
    value: Any
    nodes: tuple[Node, ...]


def shift_pads(graph: GraphModule) -> None:
    """Rewrite such pads, in place; constants are marked."""
    for node in list(graph.graph.nodes):
        call = read_call(node)
        if call is None or call.name != "pad" or not isinstance(call.arguments.get("pad"), (tuple, list)):
            continue
        writes = list(_writes(node))
        if writes and _cover_border(writes, tuple(call.arguments["pad"])) and _one_value(graph, node, writes):
            _shift(node, writes)


def _writes(pad: Node) -> Iterator[_Write]:
    """What is written into a tensor: by ``x[...] = v``, or in ATen, where slices of it are copied to."""
    for user in pad.users:
        if user.target is operator.setitem and user.args[0] is pad:
            yield _Write(_edge(user.args[1]), user.args[2], (user,))
        for views in _views(user):
            yield _Write(_edge_of_views(views[:-1]), _unexpanded(views[-1].args[1]), tuple(reversed(views)))


def _views(node: Node) -> Iterator[tuple[Node, ...]]:
    """Slices in a row that end in a copy."""
    call = read_call(node)
    for user in node.users if call is not None and call.name == "slice" else ():
        if user.target is torch.ops.aten.copy_.default and user.args[0] is node:
            yield node, user
        else:
            for rest in _views(user):
                yield node, *rest


def _edge(index: Any) -> tuple[int, slice] | None:
    """(dimension, slice) of an index that takes a slice of one dimension and all of the others."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, slice) for part in parts):
        return None
    taken = [(i, slice(part.start or None, part.stop)) for i, part in enumerate(parts) if part != _WHOLE]
    return taken[0] if len(taken) == 1 else None


def _edge_of_views(views: Sequence[Node]) -> tuple[int, slice] | None:
    edges = []
    for call in map(read_call, views):
        assert call is not None
        dim, start, end = (call.arguments.get(key, default) for key, default in (("dim", 0), ("start", None), ("end", None)))
        stop = None if not isinstance(end, int) or end >= _LAST else end
        if (start or None, stop) != (None, None):
            edges.append((dim, slice(start or None, stop)))
    return edges[0] if len(edges) == 1 else None


def _unexpanded(value: Any) -> Any:
    call = read_call(value) if isinstance(value, Node) else None
    return call.arguments["input"] if call is not None and call.name == "expand" else value


def _cover_border(writes: Sequence[_Write], amounts: tuple[Any, ...]) -> bool:
    """Whether the writes are to the border that was padded, all of it and nothing else, before anybody reads."""
    if len(amounts) != 4 or not all(isinstance(amount, int) and amount > 0 for amount in amounts):
        return False
    left, right, top, bottom = amounts
    wanted = [(2, slice(None, top)), (2, slice(-bottom, None)), (3, slice(None, left)), (3, slice(-right, None))]
    found = [write.edge for write in writes]
    return len(found) == 4 and all(edge in found for edge in wanted)


def _one_value(graph: GraphModule, pad: Node, writes: Sequence[_Write]) -> bool:
    """Whether all writes are of one constant for each channel."""
    channels = (facts(pad).shape or (0, 0))[1]
    if not all(is_constant(write.value) for write in writes):
        return False
    values = [constant_value(graph, write.value) for write in writes]
    shaped = all(tuple(value.shape)[-3:] == (channels, 1, 1) and value.numel() == channels for value in values)
    return shaped and all(torch.equal(value.flatten(), values[0].flatten()) for value in values)


def _shift(pad: Node, writes: Sequence[_Write]) -> None:
    """The three nodes stand where the border has been written."""
    gone = [node for write in writes for node in write.nodes]
    order = {node: i for i, node in enumerate(pad.graph.nodes)}
    readers = [user for user in pad.users if user not in gone]
    if not readers or min(map(order.__getitem__, readers)) < max(map(order.__getitem__, gone)):
        return
    value, operand = writes[0].value, pad.args[0]
    with pad.graph.inserting_before(min(readers, key=order.__getitem__)):
        shifted = pad.graph.call_function(operator.sub, (operand, value))
        padded = pad.graph.node_copy(pad, lambda node: shifted if node is operand else node)
        back = pad.graph.call_function(operator.add, (padded, value))
    for made, like in ((shifted, operand), (back, pad)):
        made.meta = dict(pad.meta)
        record(made, shape=facts(like).shape if isinstance(like, Node) else None)
    for reader in readers:
        reader.replace_input_with(pad, back)
    for node in gone:
        if not node.users:
            pad.graph.erase_node(node)
    pad.graph.erase_node(pad)
