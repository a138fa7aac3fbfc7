"""Write activations and residual adds over their operand where nobody else reads it; exact, for inference.

Tracing made them functional. The original network mostly does them in place, and so does whatever we compare it with.

An addition is written over an operand only where both have one size whatever the size of the input: sizes of known layers compose
(:mod:`fxmerge.core.geometry`), so two tensors computed from one tensor are alike where stride and excess are. Two that come from
different inputs, from parameters, or from behind an opaque layer might broadcast at another size.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.graph.edit import copied
from fxmerge.graph.meta import Facts, facts
from fxmerge.graph.query import has_sole_user
from fxmerge.operators import Activation, Join, Map, Operators, Verdict, default_operators
from fxmerge.passes.base import Pass

#: Activations that torch can write over their operand.
IN_PLACE = frozenset((F.relu, F.relu6, F.silu, F.hardswish, F.leaky_relu, F.elu, F.mish, F.hardtanh, F.hardsigmoid))

#: The tensor that a tensor's size depends on, and (up, stride, excess) on every axis: how.
_Size: TypeAlias = tuple[Node, tuple[tuple[int, int, int], ...]]


@dataclass(frozen=True)
class ReuseMemory(Pass):
    """Make activations and residual adds in place where that is safe."""

    operators: Operators = field(default_factory=default_operators, repr=False)
    exact: ClassVar[bool] = True

    def call(self, graph: GraphModule) -> GraphModule:
        activations = [node.name for node in graph.graph.nodes if _is_activation(node)]
        sums = self._sums(graph)
        if not activations and not sums:
            return graph
        result = copied(graph)
        for node in result.graph.nodes:
            if node.name in activations:
                node.kwargs = {**node.kwargs, "inplace": True}
            elif node.name in sums:
                over = sums[node.name]
                node.target, node.args = operator.iadd, (node.args[over], node.args[1 - over])
        result.recompile()
        return result

    def _sums(self, graph: GraphModule) -> dict[str, int]:
        """Additions that can be done in place, and which operand is written over."""
        sizes = _sizes(self.operators.verdicts(graph))
        sums = {}
        for node in graph.graph.nodes:
            if node.target is operator.add and len(node.args) == 2 and _alike(node.args[0], node.args[1], sizes):
                over = next((i for i in (0, 1) if _may_be_overwritten(node.args[i])), None)
                if over is not None:
                    sums[node.name] = over
        return sums


def _sizes(verdicts: Mapping[Node, Verdict]) -> dict[Node, _Size]:
    """How the size of every tensor follows from that of another; opaque ones stand for themselves."""
    sizes: dict[Node, _Size] = {}
    for node, verdict in verdicts.items():
        sizes[node] = _own_size(node)
        if isinstance(verdict, Join) and len({sizes[operand] for operand in verdict.operands}) == 1:
            sizes[node] = sizes[verdict.operands[0]]
        elif isinstance(verdict, (Map, Activation)) and isinstance(operand := node.args[0], Node):
            sizes[node] = (_rank(operand) == _rank(node) and _after(sizes[operand], verdict)) or sizes[node]
    return sizes


def _rank(node: Node) -> int:
    return len(facts(node).shape or ())


def _own_size(node: Node) -> _Size:
    return node, ((1, 1, -1),) * max(0, _rank(node) - 2)


def _after(size: _Size, verdict: Map | Activation) -> _Size | None:
    """The size behind a map, as :mod:`fxmerge.core.geometry` composes them; None where what became smaller becomes larger."""
    if isinstance(verdict, Activation):
        return size
    root, axes = size
    steps = list(zip(axes, verdict.geometry.axes, strict=True))
    if any(stride > 1 and axis.up > 1 for (_, stride, _), axis in steps):
        return None
    return root, tuple(
        (up * axis.up, stride * axis.stride, axis.up * (excess + stride) + stride * axis.excess)
        for (up, stride, excess), axis in steps
    )


def _alike(first: object, second: object, sizes: Mapping[Node, _Size]) -> bool:
    """Whether these are two tensors of one size, always, and of one dtype."""
    if not isinstance(first, Node) or not isinstance(second, Node) or first is second:
        return False
    one, other = facts(first), facts(second)
    return one.shape is not None and _plain(one) == _plain(other) and sizes[first] == sizes[second]


def _plain(known: Facts) -> tuple[object, ...]:
    return known.shape, known.dtype, known.channels_last


def _is_activation(node: Node) -> bool:
    done = node.kwargs.get("inplace") is True
    return node.op == "call_function" and node.target in IN_PLACE and not done and _may_be_overwritten(node.args[0])


def _may_be_overwritten(value: object) -> bool:
    """Whether this is a tensor made for its one reader: the output of a convolution or an addition, never a view or an input."""
    if not isinstance(value, Node) or not has_sole_user(value):
        return False
    if value.op == "call_module":
        return _rank(value) > 2 and _allocates(value)
    return value.op == "call_function" and value.target is operator.add


def _allocates(node: Node) -> bool:
    owner = node.graph.owning_module
    if owner is None:
        return False
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    module = owner.get_submodule(str(node.target))
    return isinstance(module, kinds) and type(module).__module__.startswith("torch.nn.modules.")
