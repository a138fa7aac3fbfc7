"""Questions about graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.graph.query import (
    between,
    data_operands,
    fingerprint,
    has_sole_user,
    is_tensor,
    module_of,
    node_named,
    shared_modules,
)
from fxmerge.graph.trace import trace
from tests.zoo import ZOO, Net, conv, images, specimen


def graph(name: str) -> GraphModule:
    return trace(specimen(name), images(name))


def node(graph: GraphModule, name: str) -> Node:
    found = node_named(graph, name)
    assert found is not None
    return found


class TestNodes:
    def test_a_node_is_found_by_its_name_or_not_at_all(self) -> None:
        g = graph("residual_plus")
        assert node(g, "bn2").target == "bn2"
        assert node_named(g, "bn3") is None

    def test_only_a_call_of_a_module_has_one(self) -> None:
        g = graph("residual_plus")
        assert isinstance(module_of(g, node(g, "bn1")), nn.BatchNorm2d)
        assert module_of(g, node(g, "add")) is None

    def test_a_sole_user_is_one(self) -> None:
        g = graph("residual_plus")
        assert has_sole_user(node(g, "conv1"))
        assert not has_sole_user(node(g, "relu"))

    def test_sizes_and_parameters_are_no_tensors_that_depend_on_the_input(self) -> None:
        net = Net(lambda s, x: x.reshape(x.size(0), -1) * s.a.bias[0], a=conv(3, 4)).double()
        g = trace(net, images())
        kinds = {n.name: is_tensor(n) for n in g.graph.nodes}
        assert kinds == {
            "x": True, "size": False, "reshape": True, "a_bias": False, "getitem": False, "mul": True, "output": False,
        }  # fmt: skip

    def test_operands_are_counted_once_for_every_use_wherever_they_stand(self) -> None:
        g = trace(Net(lambda s, x: torch.cat([x, s.a(x), x], dim=1), a=conv(3, 4)).double(), images())
        assert [n.name for n in data_operands(node(g, "cat"))] == ["x", "a", "x"]

    def test_between_holds_every_path_and_the_end_but_not_the_entry(self) -> None:
        g = graph("projection_skip")
        names = [n.name for n in between(node(g, "x"), node(g, "add"))]
        assert names == ["conv1", "bn1", "relu", "conv2", "bn2", "skip", "skip_bn", "add"]
        assert [n.name for n in between(node(g, "bn1"), node(g, "conv2"))] == ["relu", "conv2"]


class TestSharedModules:
    @pytest.mark.parametrize(
        ("name", "shared"), [("shared_module", {"twice"}), ("tied_weights", {"a", "b"}), ("residual_plus", set())]
    )
    def test_they_are_called_twice_or_hold_a_parameter_of_another(self, name: str, shared: set[str]) -> None:
        assert shared_modules(graph(name)) == shared

    def test_a_parameter_that_is_read_by_itself_does_not_count(self) -> None:
        g = trace(Net(lambda s, x: s.a(x) * s.a.bias.sum(), a=conv(3, 4)).double(), images())
        assert not shared_modules(g)

    def test_two_names_of_one_module_are_one_module(self) -> None:
        twice = conv(3, 3)
        assert shared_modules(trace(Net(lambda s, x: s.b(s.a(x)), a=twice, b=twice).double(), images())) == {"a"}


class TestFingerprint:
    @pytest.mark.parametrize("name", ZOO)
    def test_it_depends_on_no_weight(self, name: str) -> None:
        one, other = (trace(specimen(name, seed=seed), images(name)) for seed in (0, 1))
        assert fingerprint(one) == fingerprint(other)

    def test_it_depends_on_no_image_size_nor_batch_nor_dtype(self) -> None:
        model = specimen("projection_skip")
        small = trace(model, images())
        large = trace(model.float(), images(batch=5, size=(17, 20)).float())
        assert fingerprint(small) == fingerprint(large)

    def test_networks_of_the_zoo_differ(self) -> None:
        ways = ("plus_equals", "torch_add", "method_add", "method_add_in_place")
        spellings = {f"residual_{way}" for way in ways}
        prints = {name: fingerprint(graph(name)) for name in ZOO if name not in spellings}
        assert len(set(prints.values())) == len(prints)
        assert {fingerprint(graph(name)) for name in spellings} == {prints["residual_plus"]}

    @pytest.mark.parametrize(
        "other",
        [
            lambda: Net(lambda s, x: F.relu(s.a(x)), a=conv(3, 4, stride=2)),
            lambda: Net(lambda s, x: F.relu(s.a(x)), a=conv(3, 4, bias=False)),
            lambda: Net(lambda s, x: F.relu(s.a(x)), a=conv(3, 4, dilation=2)),
            lambda: Net(lambda s, x: F.relu6(s.a(x)), a=conv(3, 4)),
            lambda: Net(lambda s, x: F.relu(s.a(x))[:, :, 1:], a=conv(3, 4)),
            lambda: Net(lambda s, x: F.leaky_relu(s.a(x), 0.2), a=conv(3, 4)),
        ],
        ids=["stride", "bias", "dilation", "activation", "slice", "option"],
    )
    def test_it_depends_on_every_setting(self, other: Any) -> None:
        def of(net: nn.Module) -> str:
            return fingerprint(trace(net.double(), images()))

        assert of(other()) != of(Net(lambda s, x: F.relu(s.a(x)), a=conv(3, 4)))

    def test_it_depends_on_the_wiring(self) -> None:
        layers = {"a": conv(3, 3), "b": conv(3, 3)}
        one = Net(lambda s, x: s.b(s.a(x)) + x, **layers).double()
        other = Net(lambda s, x: (lambda y: s.b(y) + y)(s.a(x)), **layers).double()
        assert fingerprint(trace(one, images())) != fingerprint(trace(other, images()))
