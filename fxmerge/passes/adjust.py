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
from fxmerge.algebra.module import LAYERS, TRANSPOSED, weight_for
from fxmerge.graph.edit import put_module, sharing_copy
from fxmerge.graph.query import has_hooks, has_sole_user, kind_of, module_of, shared_modules

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


def layers_of(graph: GraphModule) -> dict[str, Layer]:
    """The layers of a graph, by the name of the node whose output is theirs: a norm's as well as its convolution's own.

    Those that are called twice, are parametrized, or have hooks keep their weights and are left out.
    """
    shared = shared_modules(graph)
    layers: dict[str, Layer] = {}
    for node in graph.graph.nodes:
        if not _is_free(graph, node, shared):
            continue
        if _kind(graph, node) in LAYERS:
            layers[node.name] = Layer(node)
        elif _kind(graph, node) in _NORMS:
            module: Any = module_of(graph, node)
            operand = node.args[0]
            before = layers.get(operand.name) if isinstance(operand, Node) and has_sole_user(operand) else None
            fixed = not module.training and module.affine and module.track_running_stats
            if fixed and before is not None and before.norm is None:
                layers[node.name] = Layer(before.node, node)
    return layers


def _is_free(graph: GraphModule, node: Node, shared: Collection[str]) -> bool:
    """Whether a node calls a module that can be replaced by one of other weights."""
    module = module_of(graph, node)
    return module is not None and str(node.target) not in shared and not has_hooks(module) and not is_parametrized(module)


def _kind(graph: GraphModule, node: Node) -> type[nn.Module] | None:
    module = module_of(graph, node)
    return None if module is None else kind_of(module)


def adjust(graph: GraphModule, weights: Mapping[str, Affine]) -> None:
    """Give layers other weights, in place in the graph; the modules it shares with others are replaced, not changed.

    Args:
        graph: a copy made for this.
        weights: by name of the layer's last node, the map of convolution and norm together.
    """
    layers = layers_of(graph)
    for name, affine in weights.items():
        layer = layers[name]
        old: Any = module_of(graph, layer.node)
        module: Any = sharing_copy(old)
        module.weight = nn.Parameter(weight_for(affine, like=old.weight, transposed=_kind(graph, layer.node) in TRANSPOSED))
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
        if f"{node.target}.bias" in names and _kind(graph, node) in LAYERS and module.bias is None:
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
