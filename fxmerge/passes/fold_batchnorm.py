r"""Fold every batch norm into the convolution before it; exact, and part of the baseline too.

    gamma * (W x + b - mean) / sqrt(var + eps) + beta  =  (s W) x + (s b + beta - s mean),   s = gamma / sqrt(var + eps)

Computed in float64, cast once. A norm is left where it does not follow a convolution that only it reads, has no running
statistics, or is in train mode. The folded convolution takes the norm's node, so that cuts keep their names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.algebra.module import convolution_with
from fxmerge.graph.edit import become_module, copied, tidy
from fxmerge.graph.query import has_sole_user, module_of
from fxmerge.operators import Map, Operators, Site, Verdict, default_operators
from fxmerge.operators.convolution import sharing_copy
from fxmerge.passes.base import Pass


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch norms into the convolutions before them."""

    operators: Operators = field(default_factory=default_operators, repr=False)
    exact: ClassVar[bool] = True

    def call(self, graph: GraphModule) -> GraphModule:
        folded = copied(graph)
        verdicts = self.operators.verdicts(folded)
        for node in list(folded.graph.nodes):
            convolution = _convolution_before(folded, node, verdicts)
            if convolution is not None:
                self._fold(folded, convolution, node)
                verdicts[node] = self.operators.verdict(Site(folded, node))
        return tidy(folded)

    def _fold(self, graph: GraphModule, node: Node, norm: Node) -> None:
        operator, norm_operator = self.operators.find(graph, node), self.operators.find(graph, norm)
        assert operator is not None
        assert norm_operator is not None
        affine = operator.affine(Site(graph, node)).then(norm_operator.affine(Site(graph, norm)))
        module = module_of(graph, node)
        assert module is not None
        made: Any = convolution_with(affine, like=next(module.parameters()))
        twin: Any = sharing_copy(module)
        twin._parameters.update(weight=made.weight, bias=made.bias)
        become_module(graph, norm, str(node.target), twin, node.args[0])  # type: ignore[arg-type]
        graph.graph.erase_node(node)


def _convolution_before(graph: GraphModule, norm: Node, verdicts: dict[Node, Verdict]) -> Node | None:
    verdict = verdicts.get(norm)
    if not isinstance(verdict, Map) or verdict.role != "norm":
        return None
    before, module = norm.args[0], module_of(graph, norm)
    if not isinstance(before, Node) or not has_sole_user(before) or module is None or module.training:
        return None
    verdict = verdicts.get(before)
    plain = isinstance(module_of(graph, before), nn.modules.conv._ConvNd)
    return before if plain and isinstance(verdict, Map) and verdict.role == "convolution" else None
