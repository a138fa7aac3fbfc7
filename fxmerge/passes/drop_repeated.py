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
        result = copied(graph)
        for node in list(result.graph.nodes):
            before = node.args[0] if node.args else None
            if (
                node.op == "call_function"
                and node.target in IDEMPOTENT
                and isinstance(before, Node)
                and before.target is node.target
            ):
                bypass(node, before)
        return tidy(result)
