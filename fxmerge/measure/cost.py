"""What a network holds and does, counted on its graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from fxmerge.graph.query import module_of
from fxmerge.operators import Activation, Operators, default_operators


@dataclass(frozen=True, slots=True)
class Cost:
    """Counts of one network.

    Args:
        convolutions, activations: nodes of the graph.
        parameters: numbers in them, buffers not counted.
        flops: for the inputs given, as torch counts them (a multiply-add is two).
    """

    convolutions: int
    activations: int
    parameters: int
    flops: int


def cost(graph: GraphModule, inputs: Sequence[Any], *, operators: Operators | None = None) -> Cost:
    """Count convolutions, activations, parameters and FLOPs of a graph.

    Args:
        graph: traced by fxmerge, or a pass's result.
        inputs: of the network; FLOPs are for these, whole batch.
        operators: says what is an activation; None for the default table.
    """
    verdicts = (operators or default_operators()).verdicts(graph).values()
    convolutions = sum(isinstance(module_of(graph, node), nn.modules.conv._ConvNd) for node in graph.graph.nodes)
    activations = sum(isinstance(verdict, Activation) for verdict in verdicts)
    parameters = sum(p.numel() for p in graph.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(*(value.clone() if isinstance(value, torch.Tensor) else value for value in inputs))
    return Cost(convolutions, activations, parameters, int(counter.get_total_flops()))
