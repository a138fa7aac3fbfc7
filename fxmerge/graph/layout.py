"""Where the channels of every tensor are: dimension 1 (first), or the last one (last).

A layout is a way to read a tensor, not a property of its memory. Any reading is sound as long as what is said of a node holds for
the reading of its operand and of its result (:meth:`fxmerge.operators.Operators.verdict` sees to that); a good one is that of the
layers that read it:

1. Tensors that a pointwise node, a sum, a concat, a slice or a pad has as operand and result are read alike.
2. Convolutions, batch, group and instance norms, and pools read and make channels first; linear layers, and layer norms over one
   dimension, channels last. Where the two meet, the tensor is channels first.
3. A permutation that moves dimension 1 to the end, or back, passes on what is known of one side to the other.
4. What is left is channels first; the permutation of such a tensor that moves dimension 1 to the end is channels last.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.graph.meta import facts, record
from fxmerge.graph.query import data_operands, is_tensor, module_of

_RANKS = range(3, 6)
_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
)
_FIRST_FUNCTIONS = frozenset((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.pixel_unshuffle, F.pixel_shuffle, F.channel_shuffle))
_SAME_RANK = frozenset((torch.cat, operator.getitem, F.pad))


def to_last(rank: int) -> tuple[int, ...]:
    """The permutation from channels first to channels last.

    >>> to_last(4)
    (0, 2, 3, 1)
    """
    return 0, *range(2, rank), 1


def to_first(rank: int) -> tuple[int, ...]:
    """The permutation from channels last to channels first.

    >>> to_first(4)
    (0, 3, 1, 2)
    """
    return 0, rank - 1, *range(1, rank - 1)


def turn(operand: Node) -> tuple[Node, tuple[int, ...]]:
    """The arguments of the permutation that gives a tensor its other layout."""
    known = facts(operand)
    rank = len(known.shape or ())
    return operand, to_first(rank) if known.channels_last else to_last(rank)


def turns(node: Node) -> bool:
    """Whether a node is such a permutation."""
    operand = node.args[0] if node.target is torch.permute else None
    return isinstance(operand, Node) and facts(operand).channels_last != facts(node).channels_last and node.args == turn(operand)


def mark_layouts(graph: GraphModule) -> None:
    """Record the layout of every tensor of a normalised graph whose shapes are recorded (see the module's text), in place."""
    tensors = [node for node in graph.graph.nodes if is_tensor(node) and len(facts(node).shape or ()) in _RANKS]
    known = _Readings(tensors)
    for node in tensors:
        for operand in _read_alike(node):
            known.join(node, operand)
    for node in tensors:
        last = _asks(graph, node)
        if last is not None:
            for tensor in (node, *data_operands(node)[:1]):
                known.ask(tensor, last)
    permutations = [(node, node.args[0], node.args[1]) for node in tensors if node.target is torch.permute]
    for node, operand, dims in (*permutations, *reversed(permutations)):
        for there, here, moved in ((operand, node, (to_last, to_first)), (node, operand, (to_first, to_last))):
            reading = known.of(there)
            if reading is not None and known.of(here) is None and dims == moved[reading](len(dims)):
                known.ask(here, not reading)
    for node, operand, dims in permutations:
        if not known.of(operand) and known.of(node) is None and dims == to_last(len(dims)):
            known.ask(node, True)
    for node in graph.graph.nodes:
        last = node in known and bool(known.of(node))
        if last != facts(node).channels_last:
            record(node, channels_last=last)


class _Readings:
    """Classes of tensors that are read alike, and how."""

    def __init__(self, tensors: list[Node]) -> None:
        self._above = {node: node for node in tensors}
        self._asked: dict[Node, bool] = {}

    def __contains__(self, node: object) -> bool:
        return node in self._above

    def _root(self, node: Node) -> Node:
        while self._above[node] is not node:
            self._above[node] = node = self._above[self._above[node]]
        return node

    def join(self, one: Node, other: Node) -> None:
        """Before anything is asked."""
        if one in self and other in self:
            self._above[self._root(one)] = self._root(other)

    def ask(self, node: Node, last: bool) -> None:
        if node in self:
            root = self._root(node)
            self._asked[root] = last and self._asked.get(root, True)

    def of(self, node: Node) -> bool | None:
        """Whether channels are last; None where nothing is known."""
        return self._asked.get(self._root(node)) if node in self else None


def _read_alike(node: Node) -> Iterator[Node]:
    """The operands that have the layout of the result: those of its shape, and those of a concat, a slice or a pad."""
    if node.target is torch.permute:
        return
    shape = facts(node).shape or ()
    for operand in data_operands(node):
        other = facts(operand).shape or ()
        if other == shape or (node.target in _SAME_RANK and len(other) == len(shape)):
            yield operand


def _asks(graph: GraphModule, node: Node) -> bool | None:
    """Whether a layer reads and makes channels last, or first; None where it says nothing."""
    module = module_of(graph, node)
    if isinstance(module, _FIRST) or node.target in _FIRST_FUNCTIONS:
        return False
    layer_norm = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
    return True if layer_norm or isinstance(module, nn.Linear) else None


__all__ = ["mark_layouts", "to_first", "to_last", "turn", "turns"]
