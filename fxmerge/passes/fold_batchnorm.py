r"""Fold every batch norm, and every other scale and shift of channels, into the convolution before it; exact, part of the baseline.

    gamma * (W x + b - mean) / sqrt(var + eps) + beta  =  (s W) x + (s b + beta - s mean),   s = gamma / sqrt(var + eps)

Computed in float64, cast once. A map is left where it does not follow a convolution that only it reads, has no running
statistics, or is in train mode. The folded convolution takes the map's node, so that cuts keep their names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from fxmerge.algebra.affine import Affine
from fxmerge.graph.edit import become_module, copied, tidy
from fxmerge.graph.meta import facts
from fxmerge.graph.query import has_sole_user, module_of
from fxmerge.graph.trace import require_shapes
from fxmerge.operators import Map, Operators, Site, Verdict, default_operators
from fxmerge.passes.base import Pass

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS = frozenset((nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED))


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
            if convolution is not None and self._takes(folded, convolution, verdicts[convolution]):
                self._fold(folded, convolution, node)
                verdicts[node] = self.operators.verdict(Site(folded, node))
                found = True
        return tidy(folded) if found else graph

    def _takes(self, graph: GraphModule, node: Node, verdict: Verdict) -> bool:
        """Whether this is a convolution of torch's, transposed or not, that only one node reads and nothing else disturbs."""
        module = module_of(graph, node)
        if module is None or _kind(module) not in _KINDS or not has_sole_user(node) or node.name in self.keep:
            return False
        return isinstance(verdict, Map) and not (module.training and is_parametrized(module))

    def _fold(self, graph: GraphModule, node: Node, scaling: Node) -> None:
        operator, module = self.operators.find(graph, scaling), module_of(graph, node)
        assert operator is not None
        assert module is not None
        affine = operator.affine(Site(graph, scaling))
        become_module(graph, scaling, str(node.target), _scaled(module, affine), node.args[0])  # type: ignore[arg-type]
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
    same = before.dtype == after.dtype and len(before.shape or ()) == len(after.shape or ())
    return operand if same else None


def _kind(module: nn.Module) -> type[nn.Module]:
    """The layer's own class; that of a parametrized one is made for it alone, below its own."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _scaled(module: Any, affine: Affine) -> nn.Module:
    """A convolution of the same settings whose output channels are scaled and shifted; weight (C_out, 1, ...), bias (C_out,)."""
    scale, shift = affine.weight.flatten().to(module.weight.device), affine.bias.to(module.weight.device)
    weight = module.weight.detach().double()
    if isinstance(module, _TRANSPOSED):  # (C_in, C_out/groups, *kernel)
        blocks = weight.unflatten(0, (module.groups, -1))
        weight = (blocks * scale.view(module.groups, 1, -1, *(1,) * (weight.dim() - 2))).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    bias = shift if module.bias is None else module.bias.detach().double() * scale + shift
    return _with(module, weight, bias if module.bias is not None or affine.geometry.bias else None)


def _with(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A plain layer of the same settings with these numbers, cast to the layer's dtype."""
    kind = _kind(module)
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    twin.__dict__.update({key: value for key, value in module.__dict__.items() if key not in twin.__dict__})
    for name, value in (("weight", weight), ("bias", bias)):
        twin.register_parameter(name, None if value is None else nn.Parameter(value.to(module.weight.dtype)))
    return twin
