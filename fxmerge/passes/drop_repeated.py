"""Drop an activation that directly follows its like: relu(relu(x)) = relu(x). Left behind where a block was dropped; exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fxmerge.graph.edit import bypass, copied, tidy
from fxmerge.passes.base import Pass

#: Activations f with f(f(x)) = f(x).
IDEMPOTENT = frozenset((F.relu, F.relu6))


@dataclass(frozen=True)
class DropRepeated(Pass):
    """Drop idempotent activations that follow themselves."""

    exact: ClassVar[bool] = True

    def call(self, graph: GraphModule) -> GraphModule:
        if not any(map(_repeats, graph.graph.nodes)):
            return graph
        result = copied(graph)
        for node in filter(_repeats, list(result.graph.nodes)):
            bypass(node, node.args[0])
        return tidy(result)


def _repeats(node: Node) -> bool:
    """Whether a node is an idempotent activation of its like."""
    before = node.args[0] if node.args else None
    return node.op == "call_function" and node.target in IDEMPOTENT and isinstance(before, Node) and before.target is node.target
