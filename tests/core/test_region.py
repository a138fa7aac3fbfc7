"""The tree of chains."""

from __future__ import annotations

import pytest

from fxmerge.core.region import Chain, Unit

BRANCH = Chain(("x", "a", "b"), (Unit("a", ("conv1", "a")), Unit("b", ("b",))))
BLOCK = Unit("relu", ("add", "relu"), (BRANCH,))
ROOT = Unit("", ("loose",), (Chain(("in", "x", "relu"), (Unit("x", ("x",)), BLOCK)),))


def test_a_unit_holds_its_own_nodes_and_those_of_its_branches() -> None:
    assert list(BLOCK.all_nodes()) == ["add", "relu", "conv1", "a", "b"]


def test_a_walk_visits_a_unit_before_those_inside_it() -> None:
    assert [unit.end for unit in ROOT.walk()] == ["", "x", "relu", "a", "b"]


def test_a_chain_needs_a_cut_on_both_sides_of_every_unit() -> None:
    with pytest.raises(ValueError, match="^1 units need 2 cuts, found 1$"):
        Chain(("x",), (Unit("a", ()),))
