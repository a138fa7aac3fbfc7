"""relu(relu(x)) = relu(x), and for which activations it is not so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from fxmerge.graph.trace import trace
from fxmerge.passes.drop_repeated import DropRepeated
from tests.laws import relative_error
from tests.zoo import Net, conv, images


def activations(forward: Callable[[Any, Any], Any]) -> list[str]:
    model = Net(lambda s, x: forward(s, s.a(x)), a=conv(3, 4)).double()
    graph: GraphModule = DropRepeated().apply(trace(model, images()))
    assert relative_error(model(images()), graph(images())) == 0
    return [node.name for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("function", [F.relu, F.relu6])
def test_an_idempotent_activation_is_done_once(function: Callable[[Any], Any]) -> None:
    assert activations(lambda s, x: function(function(function(x)))) == [function.__name__]


@pytest.mark.parametrize("function", [F.silu, F.hardswish, F.gelu, torch.tanh, F.leaky_relu])
def test_another_is_done_as_often_as_asked(function: Callable[[Any], Any]) -> None:
    assert len(activations(lambda s, x: function(function(x)))) == 2


def test_two_that_differ_stay() -> None:
    assert activations(lambda s, x: F.relu(F.relu6(x))) == ["relu6", "relu"]


def test_one_that_does_not_follow_directly_stays() -> None:
    assert activations(lambda s, x: F.relu(F.relu(x) - 1)) == ["relu", "sub", "relu_1"]


def test_the_first_may_have_other_readers() -> None:
    assert activations(lambda s, x: (lambda y: y * F.relu(y))(F.relu(x))) == ["relu", "mul"]
