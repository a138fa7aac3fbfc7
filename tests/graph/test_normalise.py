"""One dialect: every spelling becomes the same node, and what is overwritten is read under its new name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.graph.activations import ACTIVATION_MODULES
from fxmerge.graph.activations import ACTIVATIONS as DIALECT
from fxmerge.graph.query import module_of
from fxmerge.graph.trace import trace
from tests.laws import relative_error
from tests.zoo import Net, conv, images

Forward = Callable[[Any, Any], Any]


def traced(forward: Forward, **modules: nn.Module) -> GraphModule:
    """The graph; it has been checked against the model."""
    torch.manual_seed(0)
    return trace(Net(forward, **modules).double(), images())


def targets(graph: GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op.startswith("call_")]


def calls(forward: Forward, **modules: nn.Module) -> list[object]:
    return targets(traced(forward, **modules))


ACTIVATIONS: dict[str, tuple[Forward, object]] = {
    "F.relu": (lambda s, x: F.relu(x), F.relu),
    "F.relu in place": (lambda s, x: F.relu(x, inplace=True), F.relu),
    "F.relu in place by position": (lambda s, x: F.relu(x, True), F.relu),
    "F.relu_": (lambda s, x: F.relu_(x), F.relu),
    "torch.relu": (lambda s, x: torch.relu(x), F.relu),
    "torch.relu_": (lambda s, x: torch.relu_(x), F.relu),
    "x.relu": (lambda s, x: x.relu(), F.relu),
    "x.relu_": (lambda s, x: x.relu_(), F.relu),
    "x.tanh_": (lambda s, x: x.tanh_(), torch.tanh),
    "F.tanh": (lambda s, x: torch.tanh(x), torch.tanh),
    "x.sigmoid": (lambda s, x: x.sigmoid(), torch.sigmoid),
    "F.silu in place": (lambda s, x: F.silu(x, inplace=True), F.silu),
    "F.leaky_relu in place": (lambda s, x: F.leaky_relu(x, 0.3, True), F.leaky_relu),
    "F.leaky_relu_": (lambda s, x: F.leaky_relu_(x, 0.3), F.leaky_relu),
    "F.elu_": (lambda s, x: F.elu_(x), F.elu),
    "F.hardtanh_": (lambda s, x: F.hardtanh_(x, -0.5, 0.5), F.hardtanh),
    "F.hardtanh in place": (lambda s, x: F.hardtanh(x, -0.5, 0.5, True), F.hardtanh),
    "F.relu6 in place": (lambda s, x: F.relu6(x, inplace=True), F.relu6),
    "F.hardswish in place": (lambda s, x: F.hardswish(x, inplace=True), F.hardswish),
    "F.mish in place": (lambda s, x: F.mish(x, inplace=True), F.mish),
    "F.gelu": (lambda s, x: F.gelu(x, approximate="tanh"), F.gelu),
}


def made(kind: type[nn.Module]) -> nn.Module:
    return kind(0.1, 0.2) if kind is nn.Threshold else kind()


class TestActivations:
    @pytest.mark.parametrize("spelling", ACTIVATIONS)
    def test_every_spelling_is_one_function_without_side_effects(self, spelling: str) -> None:
        forward, function = ACTIVATIONS[spelling]
        graph = traced(lambda s, x: forward(s, s.a(x)), a=conv(3, 4))
        assert targets(graph) == ["a", function]
        [node] = [node for node in graph.graph.nodes if node.op == "call_function"]
        assert "inplace" not in node.kwargs
        assert True not in node.args

    @pytest.mark.parametrize("kind", ACTIVATION_MODULES, ids=lambda kind: kind.__name__)
    def test_a_module_becomes_its_function_with_its_options(self, kind: type[nn.Module]) -> None:
        assert calls(lambda s, x: s.act(s.a(x)), a=conv(3, 4), act=made(kind)) == ["a", DIALECT[ACTIVATION_MODULES[kind]][0]]

    @pytest.mark.parametrize(
        "module", [nn.LeakyReLU(0.7), nn.ELU(0.3), nn.GELU("tanh"), nn.Hardtanh(-0.2, 0.1), nn.Softplus(3, 1)], ids=repr
    )
    def test_options_other_than_the_default_are_kept(self, module: nn.Module) -> None:
        graph = traced(lambda s, x: s.act(x), act=module)
        assert relative_error(module(images(seed=1)), graph(images(seed=1))) == 0

    def test_a_subclass_of_an_activation_is_traced_into(self) -> None:
        class Twice(nn.ReLU):
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        assert F.relu in calls(lambda s, x: s.act(x), act=Twice())

    def test_a_module_with_hooks_stays_a_module(self) -> None:
        module = nn.ReLU()
        module.register_forward_hook(lambda module, given, result: result + 1)
        assert calls(lambda s, x: s.act(x), act=module) == ["act"]


def _plus_equals(a: Any, b: Any) -> Any:
    a += b
    return a


class TestAdds:
    @pytest.mark.parametrize(
        "add",
        [
            lambda a, b: a + b,
            _plus_equals,
            torch.add,
            lambda a, b: a.add(b),
            lambda a, b: a.add_(b),
            lambda a, b: torch.add(a, other=b),
            operator.iadd,
            lambda a, b: a.__add__(b),
        ],
        ids=["+", "+=", "torch.add", "add", "add_", "other=", "iadd", "__add__"],
    )
    def test_every_spelling_is_one_function(self, add: Forward) -> None:
        graph = traced(lambda s, x: add(s.a(x), x), a=conv(3, 3))
        assert targets(graph) == ["a", operator.add]

    def test_a_scaled_addition_is_something_else(self) -> None:
        assert calls(lambda s, x: torch.add(s.a(x), x, alpha=2), a=conv(3, 3)) == ["a", torch.add]


class TestOverwriting:
    @pytest.mark.parametrize(
        "overwrite",
        [
            lambda s, x: s.act(x),
            lambda s, x: F.relu(x, inplace=True),
            lambda s, x: F.relu_(x),
            lambda s, x: x.relu_(),
            lambda s, x: torch.relu_(x),
            lambda s, x: x.add_(1),
            lambda s, x: F.threshold(x, 0.1, 0.2, inplace=True),
            lambda s, x: F.threshold(x, 0.1, 0.2, True),
            lambda s, x: F.selu(x, inplace=True),
            lambda s, x: F.relu(x, True),
            lambda s, x: F.leaky_relu(x, 0.1, True),
        ],
        ids=["module", "inplace=", "relu_", "x.relu_", "torch.relu_", "x.add_", "threshold", "threshold(True)", "selu",
             "relu(True)", "leaky_relu(True)"],
    )  # fmt: skip
    def test_whoever_reads_the_tensor_afterwards_reads_the_result(self, overwrite: Forward) -> None:
        def forward(s: Any, x: Any) -> Any:
            before = s.a(x)
            early = before * 2
            after = overwrite(s, before)
            return early + before + s.b(after)

        traced(forward, a=conv(3, 4), b=conv(4, 4), act=nn.ReLU(inplace=True))

    def test_it_may_be_overwritten_twice(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            y = s.a(x)
            F.relu_(y)
            y.add_(x)
            return y * s.b(y)

        traced(forward, a=conv(3, 3), b=conv(3, 3))

    def test_a_tensor_overwritten_by_its_first_name_is_followed(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            y = s.a(x)
            z = F.relu_(y)
            y.add_(1)
            return z * 2

        traced(forward, a=conv(3, 3))

    @pytest.mark.parametrize(
        "write",
        [lambda y: y.mul_(3), lambda y: y.clamp_(-0.1, 0.1), lambda y: y.sub_(1.0), lambda y: y.abs_()],
        ids=["mul_", "clamp_", "sub_", "abs_"],
    )
    def test_no_operation_stays_in_place(self, write: Callable[[Any], Any]) -> None:
        graph = traced(lambda s, x: (lambda y: s.b(y) + write(y) + y)(s.a(x)), a=conv(3, 4), b=conv(4, 4))
        assert not [t for t in targets(graph) if isinstance(t, str) and t.endswith("_")]


FUNCTIONAL: dict[str, Forward] = {
    "positional": lambda s, x: F.conv2d(x, s.a.weight, s.a.bias, (1, 1), (1, 1)),
    "keywords": lambda s, x: F.conv2d(x, weight=s.a.weight, bias=s.a.bias, padding=1, stride=2),
    "no bias": lambda s, x: F.conv2d(x, s.a.weight, padding="same"),
}


class TestFunctionalLayers:
    @pytest.mark.parametrize("spelling", FUNCTIONAL)
    def test_a_convolution_on_a_modules_parameters_is_a_call_of_that_module(self, spelling: str) -> None:
        graph = traced(FUNCTIONAL[spelling], a=conv(3, 4))
        [node] = [node for node in graph.graph.nodes if node.op == "call_module"]
        assert isinstance(module_of(graph, node), nn.Conv2d)
        assert node.target == "a"

    def test_two_convolutions_on_one_weight_keep_their_own_settings(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            return F.conv2d(x, s.a.weight, padding=1) + F.conv2d(x, s.a.weight, padding=2, dilation=2) + s.a(x)

        traced(forward, a=conv(3, 4))

    def test_a_weight_computed_from_parameters_is_computed_once(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            return F.conv2d(x, s.a.weight - s.a.weight.mean(), padding=1)

        graph = traced(forward, a=conv(3, 4))
        assert targets(graph) == ["a"]
        assert abs(float(graph.get_submodule("a").weight.mean())) < 1e-15

    @pytest.mark.parametrize("front_end", ["symbolic_trace", "export"])
    def test_a_view_of_a_copy_made_for_it_stands_without_the_copy(self, front_end: Any) -> None:
        def forward(s: Any, x: Any) -> Any:
            return s.a(x).permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1, 2)

        model = Net(forward, a=conv(3, 4)).double()
        graph = trace(model, images(), front_end=front_end)
        assert relative_error(model(images(seed=1)), graph(images(seed=1))) == 0

    def test_a_weight_may_have_any_name_and_be_read_elsewhere(self) -> None:
        class Kernel(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.kernel = nn.Parameter(torch.randn(4, 3, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                return F.conv2d(x, self.kernel) * self.kernel.abs().sum()

        graph = trace(nn.Sequential(Kernel(), nn.ReLU()).double(), images())
        assert targets(graph)[0] == "0"
        assert isinstance(graph.get_submodule("0"), nn.Conv2d)

    def test_a_weight_computed_from_the_input_stays_a_function(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            return F.conv2d(x, s.a.weight * x.mean(), padding=1)

        assert F.conv2d in calls(forward, a=conv(3, 4))

    def test_a_norm_on_a_modules_statistics_is_a_call_of_that_module(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            return F.batch_norm(s.a(x), s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias, eps=1e-3)

        graph = traced(forward, a=conv(3, 4), bn=nn.BatchNorm2d(4))
        assert targets(graph) == ["a", "bn"]
        assert graph.get_submodule("bn").eps == 1e-3

    def test_a_norm_on_signals_of_one_dimension_too(self) -> None:
        class Signal(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm1d(3)

            def forward(self, x: Tensor) -> Tensor:
                return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)

        trace(Signal(), torch.zeros(2, 3, 7))

    def test_a_norm_on_the_batchs_own_statistics_stays_a_function(self) -> None:
        assert calls(lambda s, x: F.batch_norm(x, None, None, training=True)) == [F.batch_norm]


def test_asserts_on_shapes_are_gone_with_what_only_they_read() -> None:
    def forward(s: Any, x: Any) -> Any:
        torch._assert(x.shape[1] == 3, "three channels")
        return s.a(x)

    assert calls(forward, a=conv(3, 4)) == ["a"]


MODULES: dict[str, nn.Module] = {
    "conv": nn.Conv2d(3, 3, 1),
    "transposed": nn.ConvTranspose2d(3, 3, 1),
    "linear": nn.Linear(12, 5),
    "norm": nn.BatchNorm2d(3).eval(),
    "group norm": nn.GroupNorm(1, 3),
    "pool": nn.AvgPool2d(2),
    "upsample": nn.Upsample(scale_factor=2),
    "pad": nn.ZeroPad2d(1),
    "relu": nn.ReLU(inplace=True),
    "identity": nn.Identity(),
    "dropout": nn.Dropout(),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_operand_of_a_module_may_be_given_by_its_name(name: str) -> None:
    by_name = traced(lambda s, x: s.layer(input=s.first(x)), first=conv(3, 3), layer=MODULES[name])
    by_place = traced(lambda s, x: s.layer(s.first(x)), first=conv(3, 3), layer=MODULES[name])
    assert str(by_name.graph) == str(by_place.graph)


def test_code_that_nobody_reads_is_gone() -> None:
    assert calls(lambda s, x: (s.a(x), s.b(x))[1], a=conv(3, 4), b=conv(3, 4)) == ["b"]
