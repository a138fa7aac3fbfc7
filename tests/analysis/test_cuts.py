"""The region tree: what it looks like for known blocks, and against all pairs of tensors of random graphs, tried one by one."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx import GraphModule, Node

from fxmerge.analysis.cuts import region_tree
from fxmerge.analysis.segments import find_segments
from fxmerge.core.region import Chain, Unit
from fxmerge.graph.meta import record
from fxmerge.graph.query import data_operands
from fxmerge.graph.trace import trace
from tests.zoo import images, specimen


def text(unit: Unit) -> str:
    """``x a b(x c | x d)``: cuts in a row, chains inside a unit in brackets."""
    return " | ".join(_chain(chain) for chain in unit.children)


def _chain(chain: Chain) -> str:
    return " ".join([chain.cuts[0], *(unit.end + (f"({text(unit)})" if unit.children else "") for unit in chain.units)])


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("stride", "input_1 _1 _3 _4"),
        ("dropout", "input_1 _2 _5 _6"),
        ("residual_plus", "x relu relu_2(relu relu_1 bn2)"),
        ("residual_method_add_in_place", "x relu relu_2(relu relu_1 bn2)"),
        ("nested_residual", "x stem add_1(stem a relu_1(a relu b) c)"),
        ("projection_skip", "x relu_1(x relu bn2 | x skip_bn)"),
        ("option_a_skip", "x relu_1(x getitem pad | x relu bn)"),
        ("pre_activation", "x stem add(stem relu relu_1 conv2)"),
        ("overwritten_skip", "x relu add(relu relu_1 b)"),
        ("concat_branches", "x relu relu_2(relu one | relu relu_1 three | relu pool) head"),
        ("second_user", "x a mul(a relu relu_1 c | a softmax)"),
    ],
)
def test_cuts_of_known_blocks(name: str, tree: str) -> None:
    assert text(find_segments(trace(specimen(name), images(name))).region) == tree


class Dense(nn.Module):
    """Every layer reads all before it: no series-parallel graph, but with a chain inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        c = self.c(torch.relu(self.b(a)))
        return self.d(torch.relu(a + c) + torch.tanh(x + c))


def test_chains_inside_a_block_that_is_no_series_parallel_graph_are_found() -> None:
    graph = trace(Dense(), torch.zeros(1, 3, 4, 4))
    assert text(find_segments(graph).region) == "x add_2(x a | a relu c | add relu_1 | add_1 tanh) d"


#: Operands of every node, counted back from it: one for a unary node, two for an addition.
Spec = tuple[tuple[int, ...], ...]
SPECS: st.SearchStrategy[Spec] = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=2).map(tuple), min_size=1, max_size=12
).map(tuple)


def tangle(inputs: int, spec: Spec) -> GraphModule:
    """A graph of unary and binary nodes; whatever nobody reads is summed up into the output."""
    graph = fx.Graph()
    made = [graph.placeholder(f"x{i}") for i in range(inputs)]
    for operands in spec:
        nodes = tuple(made[-1 - min(back, len(made) - 1)] for back in operands)
        made.append(graph.call_function(torch.relu if len(nodes) == 1 else operator.add, nodes))
    loose = [node for node in made if not node.users]
    while len(loose) > 1:
        loose.append(graph.call_function(operator.add, (loose.pop(0), loose.pop(0))))
    graph.output(loose[0])
    for node in graph.nodes:
        record(node, shape=(1, 1, 2, 2))
    return GraphModule(nn.Module(), graph)


def below(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def regions(graph: GraphModule) -> Iterator[tuple[Node, Node, set[Node]]]:
    """All (entry, end, what lies between) with one way in and one way out, straight from the definition."""
    reach = {node: below(node) for node in graph.graph.nodes}
    for entry in reach:
        for end in (node for node in reach[entry] if node.op != "output"):
            inside = {node for node in reach[entry] if node is end or end in reach[node]}
            ways_in = [operand for node in inside for operand in data_operands(node) if operand not in inside]
            leaves = any(user not in inside for node in inside - {end} for user in node.users)
            if set(ways_in) == {entry} and not leaves:
                yield entry, end, inside


def chains(unit: Unit) -> Iterator[Chain]:
    for chain in unit.children:
        yield chain
        for inner in chain.units:
            yield from chains(inner)


@settings(max_examples=300)
@given(st.integers(1, 2), SPECS)
def test_two_tensors_are_cuts_of_one_chain_iff_they_enclose_a_region(inputs: int, spec: Spec) -> None:
    graph = tangle(inputs, spec)
    root = region_tree(graph, lambda before, node: False)
    found = [pair for chain in chains(root) for i, cut in enumerate(chain.cuts) for pair in ((cut, c) for c in chain.cuts[i + 1 :])]
    assert sorted(found) == sorted((entry.name, end.name) for entry, end, _ in regions(graph))


@given(st.integers(1, 2), SPECS)
def test_a_unit_holds_what_lies_between_its_cuts_and_its_name_is_its_own(inputs: int, spec: Spec) -> None:
    graph = tangle(inputs, spec)
    root = region_tree(graph, lambda before, node: False)
    inside = {(entry.name, end.name): {node.name for node in nodes} for entry, end, nodes in regions(graph)}
    for chain in chains(root):
        for entry, unit in zip(chain.cuts, chain.units, strict=False):
            held = list(unit.all_nodes())
            assert len(held) == len(set(held))
            assert set(held) == inside[entry, unit.end]
    ends = [unit.end for unit in root.walk()]
    assert len(ends) == len(set(ends))


def test_dead_ends_belong_to_no_chain() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.relu, (x,))
    graph.call_function(torch.tanh, (a,))
    graph.output(graph.call_function(torch.relu, (a,)))
    for node in graph.nodes:
        record(node, shape=(1, 1, 2, 2))
    assert text(region_tree(GraphModule(nn.Module(), graph), lambda before, node: False)) == "x relu relu_1"
