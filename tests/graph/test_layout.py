"""Layouts: where the channels of every tensor are, as the layers that read it have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmerge.graph.layout import to_first, to_last, turns
from fxmerge.graph.meta import Facts, facts
from fxmerge.graph.trace import trace
from tests.zoo import Net, conv

IMAGE = (2, 3, 5, 7)


def last(forward: Callable[[Any, Any], Any], shape: tuple[int, ...] = IMAGE, **modules: nn.Module) -> set[str]:
    """The nodes whose channels are last."""
    graph = trace(Net(forward, **modules).eval(), torch.randn(shape))
    return {node.name for node in graph.graph.nodes if facts(node).channels_last}


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_the_two_permutations_undo_each_other(rank: int) -> None:
    x = torch.randn(*range(2, 2 + rank))
    turned = x.permute(to_last(rank))
    assert Facts(shape=tuple(turned.shape), channels_last=True).image_shape == tuple(x.shape)
    assert Facts(channels_last=True).shape_of(x.shape) == tuple(turned.shape)
    assert turned.permute(to_first(rank)).shape == x.shape


def test_a_permutation_begins_channels_last_and_another_ends_it() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.fc(s.a(x).permute(0, 2, 3, 1)).relu() + 1
        return s.b(y.permute(0, 3, 1, 2).sigmoid())  # type: ignore[no-any-return]

    found = last(forward, a=conv(3, 4), fc=nn.Linear(4, 4), b=conv(4, 4))
    assert found == {"permute", "fc", "relu", "add"}


def test_a_permutation_of_an_unknown_image_gives_channels_last() -> None:
    assert last(lambda s, x: x.permute(0, 2, 3, 1).sin()) == {"permute", "sin"}


@pytest.mark.parametrize("dims", [(0, 3, 2, 1), (0, 1, 3, 2), (0, 2, 1, 3)])
def test_another_permutation_begins_nothing(dims: tuple[int, ...]) -> None:
    assert last(lambda s, x: s.a(x).permute(dims).relu(), a=conv(3, 3)) == set()


@pytest.mark.parametrize("layer", [nn.Linear(7, 3), nn.LayerNorm(7)])
def test_what_reads_the_last_dimension_makes_it_channels(layer: nn.Module) -> None:
    assert last(lambda s, x: s.fc(x.relu()).sigmoid(), fc=layer) == {"x", "relu", "fc", "sigmoid"}


def test_a_layer_norm_over_more_than_channels_says_nothing() -> None:
    assert last(lambda s, x: s.n(x), n=nn.LayerNorm((5, 7))) == set()


@pytest.mark.parametrize("layer", [conv(3, 3), nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.AvgPool2d(2)])
def test_layers_of_images_have_the_last_word(layer: nn.Module) -> None:
    assert last(lambda s, x: (s.a(x), s.fc(x)), a=layer, fc=nn.Linear(7, 7)).isdisjoint({"x", "a"})


def test_what_is_known_behind_a_permutation_holds_before_it() -> None:
    assert last(lambda s, x: s.a((x + 1).permute(0, 3, 1, 2)), a=conv(7, 4)) == {"x", "add"}


def test_what_is_known_behind_two_permutations_holds_before_both() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.fc((x + 1).permute(0, 3, 1, 2).sin().permute(0, 2, 3, 1))  # type: ignore[no-any-return]

    assert last(forward, fc=nn.Linear(7, 4)) == {"x", "add", "permute_1", "fc"}


def test_tokens_are_channels_last_from_their_permutation_on() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.a(x).flatten(2).transpose(1, 2)
        return s.fc(s.norm(torch.cat((y, y), 1)))  # type: ignore[no-any-return]

    found = last(forward, a=conv(3, 4), norm=nn.LayerNorm(4), fc=nn.Linear(4, 4))
    assert found == {"permute", "cat", "norm", "fc"}


def test_only_a_change_of_layout_turns() -> None:
    graph = trace(
        Net(lambda s, x: s.fc(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 2, 1), a=conv(3, 4), fc=nn.Linear(4, 4)), torch.randn(IMAGE)
    )
    assert [node.name for node in graph.graph.nodes if turns(node)] == ["permute"]
