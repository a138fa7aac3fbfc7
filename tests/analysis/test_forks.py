"""Readers of one tensor that meet before the others do are a group, and their block a region of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxmerge.analysis.forks import Group, group_readers
from fxmerge.analysis.segments import find_segments
from fxmerge.graph.trace import trace
from tests.zoo import Net, conv, images


def grouped(forward: Any) -> Any:
    """The readers of the input, by name."""
    graph = trace(Net(forward), torch.zeros(1, 3, 4, 4)).graph
    nodes = list(graph.nodes)

    def names(items: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(names(item.members) if isinstance(item, Group) else item.name for item in items)

    return names(group_readers(nodes, {node: list(node.users) for node in nodes})[nodes[0]])


def test_the_readers_of_a_block_are_a_group_beside_one_that_comes_later() -> None:
    assert grouped(lambda s, x: torch.cat((torch.relu(x + torch.sin(x)), x), 1)) == (("sin", "add"), "cat")


def test_groups_nest() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return torch.cos(torch.sin(torch.relu(x) + torch.tanh(x)) + x) * x

    assert grouped(forward) == ((("relu", "tanh"), "add_1"), "mul")


def test_readers_that_all_meet_at_one_place_are_no_group() -> None:
    assert grouped(lambda s, x: torch.cat((torch.relu(x), torch.tanh(x), torch.sin(x)), 1)) == ("relu", "tanh", "sin")


def test_readers_that_meet_nowhere_before_the_end_are_no_group() -> None:
    assert grouped(lambda s, x: (torch.relu(x), torch.tanh(x))) == ("relu", "tanh")


def test_a_block_whose_input_is_kept_for_later_is_a_segment() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        x = s.stem(x)
        y = x + s.b(F.relu(s.a(x)))
        return s.last(torch.cat((F.max_pool2d(y, 3, 1, 1), x), 1))

    modules = {"stem": conv(3, 4), "a": conv(4, 4), "b": conv(4, 4), "last": conv(8, 3)}
    findings = find_segments(trace(Net(forward, **modules), images().float()))
    assert "stem -> add" in {str(segment) for segment in findings.segments}
