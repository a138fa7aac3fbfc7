"""Edits of graphs, each on a copy whose original must not notice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fxmerge.graph.edit import become_module, bypass, copied, free_target, insert_pad, put_module, tidy
from fxmerge.graph.meta import facts, origin, record, set_origin
from fxmerge.graph.query import node_named
from fxmerge.graph.trace import trace
from tests.zoo import conv, images, specimen


@pytest.fixture
def graph() -> GraphModule:
    return trace(specimen("residual_plus"), images())


class TestCopies:
    def test_a_copy_shares_the_layers_and_nothing_else(self, graph: GraphModule) -> None:
        twin = copied(graph)
        assert twin.get_submodule("conv1") is graph.get_submodule("conv1")
        assert twin.graph is not graph.graph
        assert str(twin.graph) == str(graph.graph)

    def test_facts_written_on_a_copy_are_not_on_the_original(self, graph: GraphModule) -> None:
        twin = copied(graph)
        record(next(iter(twin.graph.nodes)), role="removed")
        set_origin(twin, "here")
        assert facts(next(iter(graph.graph.nodes))).role == ""
        assert (origin(twin), origin(graph), origin(copied(twin))) == ("here", None, "here")

    def test_a_module_put_into_a_copy_is_not_in_the_original(self, graph: GraphModule) -> None:
        twin = copied(graph)
        put_module(twin, "deep.er.layer", nn.Identity())
        put_module(twin, "conv1", nn.Identity())
        assert isinstance(twin.get_submodule("deep.er.layer"), nn.Identity)
        assert not hasattr(graph, "deep")
        assert isinstance(graph.get_submodule("conv1"), nn.Conv2d)


class TestNames:
    def test_a_name_that_is_free_is_taken_as_it_is(self, graph: GraphModule) -> None:
        assert free_target(graph, "merged.add") == "merged.add"

    def test_a_name_that_is_taken_gets_a_number(self, graph: GraphModule) -> None:
        put_module(graph, "merged.add", nn.Identity())
        put_module(graph, "merged.add_1", nn.Identity())
        assert free_target(graph, "merged.add") == "merged.add_2"

    def test_a_name_below_a_layer_of_the_model_is_not_used(self, graph: GraphModule) -> None:
        target = free_target(graph, "conv1.inner")
        put_module(graph, target, nn.Identity())
        assert not [*graph.get_submodule("conv1").children()]


class TestNodes:
    def test_a_node_that_becomes_a_module_keeps_its_name_and_readers(self, graph: GraphModule) -> None:
        add, stem = node_named(graph, "add"), node_named(graph, "stem")
        assert add is not None
        assert stem is not None
        become_module(graph, add, "made", nn.Identity(), stem)
        tidy(graph)
        assert [(n.name, str(n.target)) for n in graph.graph.nodes if n.op == "call_module"] == [("stem", "stem"), ("add", "made")]
        assert set(dict(graph.named_children())) == {"stem", "made"}
        assert not graph.get_submodule("made").training

    def test_a_pad_knows_its_shape(self, graph: GraphModule) -> None:
        conv1 = node_named(graph, "conv1")
        assert conv1 is not None
        pad = insert_pad(conv1.all_input_nodes[0], conv1, (1, 2, -1, 0))
        conv1.args = (pad,)
        tidy(graph)
        assert facts(pad).shape == (2, 4, 11, 15)
        made: list[tuple[int, ...]] = []
        graph.get_submodule("conv1").register_forward_pre_hook(lambda module, given: made.append(tuple(given[0].shape)))
        with pytest.raises(RuntimeError, match="must match the size"):
            graph(images())
        assert made == [(2, 4, 11, 15)]

    def test_a_node_that_is_bypassed_is_gone(self, graph: GraphModule) -> None:
        relu = node_named(graph, "relu_1")
        assert relu is not None
        bypass(relu, relu.all_input_nodes[0])
        tidy(graph)
        assert node_named(graph, "relu_1") is None
        conv2 = node_named(graph, "conv2")
        assert conv2 is not None
        assert [n.name for n in conv2.all_input_nodes] == ["bn1"]


class TestTidy:
    def test_dead_code_and_its_modules_go(self) -> None:
        graph = trace(nn.Sequential(conv(3, 4), conv(4, 4)), torch.zeros(1, 3, 8, 8))
        output = graph.graph.output_node()
        output.args = (output.all_input_nodes[0].all_input_nodes[0],)
        assert list(dict(tidy(graph).named_children())) == ["0"]

    def test_a_broken_graph_is_noticed(self) -> None:
        graph = trace(nn.Sequential(conv(3, 4)), torch.zeros(1, 3, 8, 8))
        delattr(graph, "0")
        with pytest.raises(RuntimeError, match="0"):
            tidy(graph)
