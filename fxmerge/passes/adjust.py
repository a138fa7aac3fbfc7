r"""Layers that stay get other weights: those fitted to what the student, rather than the original, feeds them.

A layer is a convolution or a linear layer, with the batch norm behind it if there is one. The two keep their names and their
modules' classes; the norm is left with statistics of 0 and 1 and the scale that undoes its epsilon, so that its shift is the bias
of both together, and :func:`fxmerge.tune.calibrate_norms` can give it the statistics of its data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from fxmerge.algebra.affine import Affine
from fxmerge.algebra.module import weight_for
from fxmerge.graph.edit import put_module, sharing_copy
from fxmerge.graph.query import has_hooks, has_sole_user, kind_of, module_of, node_named, shared_modules

_TRANSPOSED = frozenset((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
_LAYERS = _TRANSPOSED | {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear}
_NORMS = frozenset((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of a graph that can be given other weights.

    Args:
        node: of the convolution or linear layer.
        norm: of the batch norm behind it.
    """

    node: Node
    norm: Node | None = None


def layer_at(graph: GraphModule, name: str) -> Layer | None:
    """The layer whose output, its norm's if it has one, is the node of this name; None where there is no such layer.

    A layer that is called twice, is parametrized, or has hooks keeps its weights.
    """
    node = node_named(graph, name)
    if node is None or node.op != "call_module":
        return None
    norm = None
    if _kind(graph, node) in _NORMS:
        module: Any = module_of(graph, node)
        operand = node.args[0]
        fixed = not module.training and module.affine and module.track_running_stats
        if not fixed or not isinstance(operand, Node) or not has_sole_user(operand):
            return None
        node, norm = operand, node
    if _kind(graph, node) not in _LAYERS:
        return None
    shared = shared_modules(graph)
    for part in (node, norm) if norm is not None else (node,):
        found = module_of(graph, part)
        if found is None or str(part.target) in shared or has_hooks(found) or is_parametrized(found):
            return None
    return Layer(node, norm)


def _kind(graph: GraphModule, node: Node) -> type[nn.Module] | None:
    module = module_of(graph, node)
    return None if module is None else kind_of(module)


def adjust(graph: GraphModule, weights: Mapping[str, Affine]) -> None:
    """Give layers other weights, in place in the graph; the modules it shares with others are replaced, not changed.

    Args:
        graph: a copy made for this.
        weights: by name of the layer's last node, the map of convolution and norm together.
    """
    for name, affine in weights.items():
        layer = layer_at(graph, name)
        assert layer is not None, name
        old: Any = module_of(graph, layer.node)
        module: Any = sharing_copy(old)
        module.weight = nn.Parameter(weight_for(affine, like=old.weight, transposed=_kind(graph, layer.node) in _TRANSPOSED))
        bias = affine.bias.to(old.weight)
        if layer.norm is not None:
            if old.bias is not None:
                module.bias = nn.Parameter(torch.zeros_like(old.bias))
            put_module(graph, str(layer.norm.target), _shifting(module_of(graph, layer.norm), bias))
        else:
            module.bias = nn.Parameter(bias)
        put_module(graph, str(layer.node.target), module)


def give_biases(graph: GraphModule, names: Collection[str]) -> None:
    """Give layers without a bias one of zeros, where its name is among these; in place."""
    for node in graph.graph.nodes:
        module: Any = module_of(graph, node)
        if f"{node.target}.bias" in names and _kind(graph, node) in _LAYERS and module.bias is None:
            outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            module.bias = nn.Parameter(module.weight.new_zeros(outputs))


def _shifting(old: Any, bias: torch.Tensor) -> nn.Module:
    """A batch norm that, in eval mode, only adds this."""
    norm: Any = sharing_copy(old)
    norm.weight = nn.Parameter(torch.full_like(old.weight, (1 + old.eps) ** 0.5))
    norm.bias = nn.Parameter(bias.to(old.bias))
    norm.running_mean = torch.zeros_like(old.running_mean)
    norm.running_var = torch.ones_like(old.running_var)
    made: nn.Module = norm
    return made
