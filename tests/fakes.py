"""A timer without a clock: latency is a fixed price per layer plus one per multiply-add, the same on every machine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.fx import GraphModule

from fxmerge.core.table import Measurement, Target
from fxmerge.graph.query import describe_module
from fxmerge.measure.timer import Timed

LAYER_NS, MAC_PICOSECONDS, ACTIVATION_NS = 20_000, 30, 10_000


class PriceTimer:
    """Counts instead of timing; remembers what it was asked to time."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.settings = "prices"

    def __call__(
        self, modules: Sequence[Timed], *, target: Target, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Measurement, ...]:
        return tuple(Measurement(self._price(timed), 0, 1, target) for timed in modules)

    def _price(self, timed: Timed) -> int:
        total = 0

        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            nonlocal total
            if isinstance(module, nn.modules.conv._ConvNd):
                macs = output.numel() * math.prod(module.weight.shape[1:])
                total += LAYER_NS + macs * MAC_PICOSECONDS // 1000

        assert isinstance(timed.module, GraphModule)
        module = copy.deepcopy(timed.module).float()
        for part in module.modules():
            part.register_forward_hook(hook)
        inputs = [_as_input(value) for value in timed.inputs]
        with torch.no_grad():
            module(*inputs)
        calls = [node for node in timed.module.graph.nodes if node.op == "call_function"]
        self.asked.append(" ".join(describe_module(m) for m in timed.module.children()))
        return total + ACTIVATION_NS * len(calls)


def _as_input(value: object) -> object:
    """Sizes become images of zeros; what is no tensor stays."""
    if isinstance(value, tuple) and all(isinstance(size, int) for size in value):
        return torch.zeros(value, dtype=torch.float32)
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
