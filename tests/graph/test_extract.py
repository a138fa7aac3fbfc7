"""A stretch by itself, and the text by which equal work is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxmerge.graph.extract import extract, signature
from fxmerge.graph.trace import trace


class Product(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + x)


def text(model: nn.Module, x: Tensor) -> str:
    graph = trace(model.eval(), x)
    return signature(*extract(graph, [node for node in graph.graph.nodes if node.op.startswith("call_")]))


def test_constants_of_other_sizes_or_types_are_other_work_and_other_numbers_are_not() -> None:
    square, wide = torch.randn(64, 64), torch.randn(64, 256)
    x, whole = torch.randn(2, 64), torch.ones(2, 64, dtype=torch.int64)
    assert text(Product(square), x) == text(Product(-square), x)
    assert text(Product(square), x) != text(Product(wide), x)
    assert text(Product(square.int()), whole.int()) != text(Product(square.long()), whole)


def test_inputs_of_other_types_are_other_work_but_floating_ones_take_the_targets() -> None:
    x = torch.ones(2, 3)
    assert text(Rows(), x) == text(Rows(), x.double()) == "add (%0 %0); relu (%1) @ 2x3"
    assert len({text(Rows(), y) for y in (x, x.int(), x.long())}) == 3
