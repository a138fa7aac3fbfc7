"""Write activations and residual adds over their operand where nobody else reads it; exact, for inference.

Tracing made them functional. The original network mostly does them in place, and so does whatever we compare it with.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.graph.edit import copied
from fxmerge.graph.meta import facts
from fxmerge.graph.query import has_sole_user
from fxmerge.passes.base import Pass

_ACTIVATIONS = frozenset((F.relu, F.relu6, F.silu, F.hardswish, F.leaky_relu, F.elu, F.mish, F.hardtanh, F.hardsigmoid))
_ADDS = frozenset((operator.add, operator.iadd))


@dataclass(frozen=True)
class ReuseMemory(Pass):
    """Make activations and residual adds in place where that is safe."""

    exact: ClassVar[bool] = True

    def call(self, graph: GraphModule) -> GraphModule:
        result = copied(graph)
        fed = _fed(result)
        for node in result.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in _ACTIVATIONS and _may_be_overwritten(node.args[0]):
                node.kwargs = {**node.kwargs, "inplace": True}
            elif node.target is operator.add and len(node.args) == 2 and _same_shape(*node.args):
                _add_in_place(node, fed)
        result.recompile()
        return result


def _fed(graph: GraphModule) -> set[Node]:
    """The nodes that depend on an input, and so grow with its batch."""
    fed: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(operand in fed for operand in node.all_input_nodes):
            fed.add(node)
    return fed


def _add_in_place(node: Node, fed: set[Node]) -> None:
    first, second = node.args
    if first is second or not {first, second} <= fed:
        return
    if _may_be_overwritten(first):
        node.target = operator.iadd
    elif _may_be_overwritten(second):
        node.target, node.args = operator.iadd, (second, first)


def _may_be_overwritten(value: object) -> bool:
    """Whether this is a tensor made for its one reader: the output of a convolution or an addition, never a view or an input."""
    if not isinstance(value, Node) or not has_sole_user(value):
        return False
    if value.op == "call_module":
        return len(facts(value).shape or ()) > 2 and _allocates(value)
    return value.op == "call_function" and value.target in _ADDS


def _allocates(node: Node) -> bool:
    owner = node.graph.owning_module
    if owner is None:
        return False
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    module = owner.get_submodule(str(node.target))
    return isinstance(module, kinds) and type(module).__module__.startswith("torch.nn.modules.")


def _same_shape(first: object, second: object) -> bool:
    return (
        isinstance(first, Node)
        and isinstance(second, Node)
        and facts(first).shape is not None
        and facts(first).shape == facts(second).shape
        and facts(first).dtype == facts(second).dtype
    )
