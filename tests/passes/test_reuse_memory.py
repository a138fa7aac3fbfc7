"""In place where that is safe: the same numbers, no input overwritten, nothing overwritten that is read later."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

from fxmerge.graph.trace import trace
from fxmerge.passes.fold_batchnorm import FoldBatchNorm
from fxmerge.passes.reuse_memory import ReuseMemory
from tests import zoo
from tests.laws import relative_error
from tests.strategies import SMALLEST, Network, networks
from tests.zoo import Net, conv, images, specimen


def in_place(forward: Callable[[Any, Any], Any], **modules: nn.Module) -> set[str]:
    """Names of the nodes that write over their operand; results and input are compared on the way."""
    model = Net(forward, **modules).double().eval()
    graph = ReuseMemory().apply(trace(model, images()))
    for batch in (1, 2, 5):
        x = images(batch=batch, seed=batch)
        given = x.clone()
        with torch.no_grad():
            expected, found = model(x.clone()), graph(given)
        for one, other in zip(fx.node.map_aggregate([expected], lambda t: t), [found], strict=True):
            assert torch.equal(torch.cat([t.flatten() for t in _leaves(one)]), torch.cat([t.flatten() for t in _leaves(other)]))
        assert torch.equal(x, given)
    return {n.name for n in graph.graph.nodes if n.kwargs.get("inplace") or n.target is operator.iadd}


def _leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


class TestMayBeOverwritten:
    @pytest.mark.parametrize(
        "function", [F.relu, F.relu6, F.silu, F.hardswish, F.leaky_relu, F.elu, F.mish, F.hardtanh, F.hardsigmoid]
    )
    def test_a_convolutions_output_by_its_activation(self, function: Callable[[Any], Any]) -> None:
        assert in_place(lambda s, x: function(s.a(x)), a=conv(3, 4)) == {function.__name__}

    def test_a_norms_output(self) -> None:
        assert in_place(lambda s, x: F.relu(s.bn(x)), bn=nn.BatchNorm2d(3)) == {"relu"}

    def test_one_operand_of_a_sum_and_then_the_sum(self) -> None:
        layers = {"a": conv(3, 4), "b": conv(3, 4)}
        assert in_place(lambda s, x: F.relu(s.a(x) + s.b(x)), **layers) == {"add", "relu"}

    def test_a_sum_of_two_paths_of_one_stride_behind_an_opaque_layer(self) -> None:
        layers = {"a": conv(3, 3, stride=2), "b": conv(3, 3, 1, stride=2, padding=0), "pool": nn.MaxPool2d(2)}
        assert in_place(lambda s, x: (lambda y: s.a(s.a1(y)) + s.b(y))(s.pool(x)), a1=conv(3, 3), **layers) == {"add"}

    def test_a_sum_of_two_paths_that_double_the_image(self) -> None:
        layers = {"a": nn.ConvTranspose2d(3, 3, 4, 2, 1), "b": conv(3, 3), "up": nn.Upsample(scale_factor=2)}
        assert in_place(lambda s, x: s.a(x) + s.b(s.up(x)), **layers) == {"add"}

    def test_the_second_operand_where_the_first_is_read_again(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            y = s.a(x)
            return (y + s.b(y)) * y

        assert in_place(forward, a=conv(3, 4), b=conv(4, 4)) == {"add"}


class TestMustNotBeOverwritten:
    @pytest.mark.parametrize(
        "forward",
        [
            lambda s, x: F.relu(x),
            lambda s, x: x + F.relu(x),
            lambda s, x: F.relu(s.identity(x)),
            lambda s, x: F.relu(s.dropout(x)),
            lambda s, x: F.relu(x[:, :, 1:]),
            lambda s, x: F.relu(x.view(2 if False else -1, 3, 12, 12)),
        ],
        ids=["input", "input in a sum", "identity", "dropout", "slice", "view"],
    )
    def test_the_input_or_a_view_of_it(self, forward: Callable[[Any, Any], Any]) -> None:
        assert not in_place(forward, identity=nn.Identity(), dropout=nn.Dropout())

    def test_a_tensor_that_is_read_twice(self) -> None:
        assert in_place(lambda s, x: (lambda y: F.relu(y) * y)(s.a(x)), a=conv(3, 4)) == set()

    def test_a_tensor_that_is_handed_out(self) -> None:
        assert in_place(lambda s, x: (lambda y: (F.relu(y), y))(s.a(x)), a=conv(3, 4)) == set()

    def test_a_tensor_of_which_a_view_is_handed_out(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            y = s.identity(s.a(x))
            return F.relu(y) + 0 * y

        assert in_place(forward, a=conv(3, 4), identity=nn.Identity()) == set()

    def test_a_sum_of_a_tensor_with_itself(self) -> None:
        assert in_place(lambda s, x: (lambda y: y + y)(s.a(x)), a=conv(3, 4)) == set()

    def test_an_operand_that_is_smaller_than_the_sum(self) -> None:
        assert in_place(lambda s, x: s.a(x) + s.b(x), a=conv(3, 1), b=conv(3, 4)) <= {"add"}

    def test_an_activation_that_cannot_write_in_place(self) -> None:
        assert in_place(lambda s, x: F.gelu(torch.tanh(s.a(x))), a=conv(3, 4)) == set()

    def test_an_operand_that_does_not_grow_with_the_batch(self) -> None:
        class Positions(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.positions = nn.Parameter(torch.randn(1, 3, 12, 12))
                self.a, self.b = conv(3, 4), conv(3, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.a(self.positions) + self.b(x)

        model = Positions().double()
        graph = ReuseMemory().apply(trace(model, images(batch=1)))
        with torch.no_grad():
            assert relative_error(model(images(batch=3)), graph(images(batch=3))) == 0

    def test_an_operand_that_may_be_smaller_at_another_size(self) -> None:
        def context(s: Any, x: Any) -> Any:
            return s.c(F.relu(s.b(F.adaptive_avg_pool2d(x, 1)) + s.a(x)))

        model = Net(context, a=conv(3, 4, 1), b=conv(3, 4, 1), c=conv(4, 4, 1)).double()
        graph = ReuseMemory().apply(trace(model, images(size=(1, 1))))
        x = images(size=(5, 4))
        with torch.no_grad():
            assert relative_error(model(x), graph(x)) == 0

    @pytest.mark.parametrize("batches", [(1, 4), (4, 1)])
    def test_operands_that_depend_on_two_inputs(self, batches: tuple[int, int]) -> None:
        class Template(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = conv(3, 4), conv(3, 4)

            def forward(self, x: Tensor, template: Tensor) -> Tensor:
                return self.b(template) + self.a(x)

        model = Template().double()
        graph = ReuseMemory().apply(trace(model, (images(batch=1), images(batch=1))))
        pair = [images(batch=batch) for batch in batches]
        with torch.no_grad():
            assert relative_error(model(*pair), graph(*pair)) == 0

    def test_operands_of_which_one_became_smaller_and_larger_again(self) -> None:
        layers = {"a": conv(3, 3), "down": conv(3, 3, stride=2), "up": nn.ConvTranspose2d(3, 3, 2, 2)}
        assert in_place(lambda s, x: s.a(x) + s.up(s.down(x)), **layers) == set()
        layers = {"up": nn.ConvTranspose2d(3, 3, 2, 2), "a": nn.Conv2d(3, 3, 2, 2, 1), "b": nn.Conv2d(3, 3, 2, 2, 2)}
        assert in_place(lambda s, x: s.up(s.a(x)) + s.b(s.nearest(x)), nearest=nn.Upsample(scale_factor=2), **layers) == set()

    def test_operands_whose_sizes_agree_for_the_example_alone(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            return s.a(x) + s.b(x)[:, :, :1, :1]

        model = Net(forward, a=conv(3, 4, 12, padding=0), b=conv(3, 4)).double()
        graph = ReuseMemory().apply(trace(model, images(size=(12, 12))))
        assert not [node for node in graph.graph.nodes if node.target is operator.iadd]

    def test_a_sum_that_somebody_else_made_in_place_under_a_view(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            y = s.a(x)
            return y.view(-1).sum() + F.relu(y + s.b(x)).sum()

        graph = fx.symbolic_trace(Net(forward, a=conv(3, 4), b=conv(3, 4)).double())
        made = next(node for node in graph.graph.nodes if node.name == "add")
        made.target = operator.iadd
        view, relu = (next(n for n in graph.graph.nodes if n.name == name) for name in ("sum_1", "relu"))
        relu.append(view)  # read after the activation
        graph.recompile()
        with torch.no_grad():
            assert relative_error(graph(images()), ReuseMemory().apply(graph)(images())) < 1e-14

    def test_the_output_of_a_module_of_someone_else_whatever_its_name(self) -> None:
        class ConvOrNothing(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x

        class Leaves(fx.Tracer):
            def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
                return isinstance(m, ConvOrNothing) or super().is_leaf_module(m, module_qualified_name)

        model = nn.Sequential(ConvOrNothing(), nn.ReLU())
        graph = trace(fx.GraphModule(model, Leaves().trace(model)), images())
        x = images()
        ReuseMemory().apply(graph)(x)
        assert torch.equal(x, images())


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_zoo_computes_the_same_and_keeps_its_input(name: str) -> None:
    model = specimen(name)
    graph = ReuseMemory().apply(FoldBatchNorm().apply(trace(model, images(name))))
    x = images(name, batch=3, seed=4)
    given = x.clone()
    with torch.no_grad():
        assert relative_error(model(x.clone()), graph(given)) < 1e-14
        assert relative_error(model(x.clone()), graph(given)) < 1e-14  # nothing of the first run is left over
    assert torch.equal(x, given)


@settings(max_examples=50)
@given(networks())
def test_random_networks_compute_the_same_and_keep_their_input(network: Network) -> None:
    model = network.build()
    graph = ReuseMemory().apply(trace(model, images(size=(SMALLEST, 16))))
    x = images(size=(15, SMALLEST), batch=1, seed=4)
    given = x.clone()
    with torch.no_grad():
        assert relative_error(model(x.clone()), graph(given)) == 0
    assert torch.equal(x, given)
