r"""Fold every batch norm, and every other scale and shift of channels, into the convolution before it; exact, part of the baseline.

    gamma * (W x + b - mean) / sqrt(var + eps) + beta  =  (s W) x + (s b + beta - s mean),   s = gamma / sqrt(var + eps)

Computed in float64, cast once. Linear layers on channels last count as convolutions, and a permutation to or from channels last may
stand before the scale. A map is left where it does not follow a convolution that only it reads, has no running
statistics, or is in train mode. The folded convolution takes the map's node, so that cuts keep their names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from fxmerge.algebra.affine import Affine
from fxmerge.algebra.module import LAYERS, TRANSPOSED
from fxmerge.graph.edit import become_module, become_turned, copied, tidy
from fxmerge.graph.layout import turns
from fxmerge.graph.meta import Facts, facts, record
from fxmerge.graph.query import has_sole_user, kind_of, module_of
from fxmerge.graph.trace import require_shapes
from fxmerge.operators import Map, Operators, Site, Verdict, default_operators
from fxmerge.passes.base import Pass


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch norms and the like into the convolutions before them.

    Args:
        operators: what is known of operators.
        keep: names of convolutions whose own output is wanted; nothing is folded into these.
    """

    operators: Operators = field(default_factory=default_operators, repr=False)
    keep: frozenset[str] = frozenset()
    exact: ClassVar[bool] = True

    def requires(self, graph: GraphModule) -> None:
        require_shapes(graph)

    def call(self, graph: GraphModule) -> GraphModule:
        folded = copied(graph)
        verdicts = self.operators.verdicts(folded)
        found = False
        for node in list(folded.graph.nodes):
            convolution = _operand_of_scaling(folded, node, verdicts[node])
            turned = convolution if convolution is not None and self._turns(convolution) else None
            if turned is not None:
                convolution = turned.args[0]  # type: ignore[assignment]
            if convolution is not None and self._takes(folded, convolution, verdicts[convolution]):
                self._fold(folded, convolution, node, turned)
                for changed in (turned, node) if turned is not None else (node,):
                    verdicts[changed] = self.operators.verdict(Site(folded, changed))
                found = True
        return tidy(folded) if found else graph

    def _takes(self, graph: GraphModule, node: Node, verdict: Verdict) -> bool:
        """Whether this is a convolution of torch's, transposed or not, that only one node reads and nothing else disturbs."""
        module = module_of(graph, node)
        if module is None or kind_of(module) not in LAYERS or not has_sole_user(node) or node.name in self.keep:
            return False
        return isinstance(verdict, Map) and not (module.training and is_parametrized(module))

    def _turns(self, node: Node) -> bool:
        """Whether a node does nothing but give a tensor its other layout, for one reader."""
        return turns(node) and has_sole_user(node) and node.name not in self.keep

    def _fold(self, graph: GraphModule, node: Node, scaling: Node, turned: Node | None) -> None:
        """The scaled convolution takes the node of the scaling, or that of the permutation between them, which moves on there."""
        operator, module = self.operators.find(graph, scaling), module_of(graph, node)
        assert operator is not None
        assert module is not None
        affine = operator.affine(Site(graph, scaling))
        home = turned or scaling
        become_module(graph, home, str(node.target), _scaled(module, affine), node.args[0])  # type: ignore[arg-type]
        if turned is not None:
            record(turned, shape=facts(node).shape, channels_last=facts(node).channels_last)
            become_turned(scaling, turned)
        graph.graph.erase_node(node)


def _operand_of_scaling(graph: GraphModule, node: Node, verdict: Verdict) -> Node | None:
    """What a node scales and shifts channel by channel, where that is all it does; else None."""
    if not isinstance(verdict, Map) or verdict.role == "side":
        return None
    geometry, module = verdict.geometry, module_of(graph, node)
    alone = geometry.pointwise and geometry.groups == geometry.in_channels == geometry.out_channels
    operand = node.args[0]
    if not alone or not isinstance(operand, Node) or (module is not None and module.training):
        return None
    before, after = facts(operand), facts(node)
    same = _kept(before) == _kept(after)
    return operand if same else None


def _kept(known: Facts) -> tuple[object, ...]:
    """What a scaling leaves as it is."""
    return known.dtype, len(known.shape or ()), known.channels_last


def _scaled(module: Any, affine: Affine) -> nn.Module:
    """A convolution of the same settings whose output channels are scaled and shifted; weight (C_out, 1, ...), bias (C_out,)."""
    scale, shift = affine.weight.flatten().to(module.weight.device), affine.bias.to(module.weight.device)
    weight = module.weight.detach().double()
    if kind_of(module) in TRANSPOSED:  # (C_in, C_out/groups, *kernel)
        blocks = weight.unflatten(0, (module.groups, -1))
        weight = (blocks * scale.view(module.groups, 1, -1, *(1,) * (weight.dim() - 2))).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    bias = shift if module.bias is None else module.bias.detach().double() * scale + shift
    return _with(module, weight, bias if module.bias is not None or affine.geometry.bias else None)


def _with(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A plain layer of the same settings with these numbers, cast to the layer's dtype."""
    kind = kind_of(module)
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    twin.__dict__.update({key: value for key, value in module.__dict__.items() if key not in twin.__dict__})
    for name, value in (("weight", weight), ("bias", bias)):
        twin.register_parameter(name, None if value is None else nn.Parameter(value.to(module.weight.dtype)))
    return twin
