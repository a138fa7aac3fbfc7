"""Nested values are opened, dataclasses too, and what is inside is named by the way to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxmerge.core.leaves import leaves, named_leaves


@dataclass
class Pair:
    one: object
    other: object


def test_dataclasses_are_opened_wherever_they_stand() -> None:
    value = {"a": Pair(1, [Pair(2, (3,))]), "b": 4}
    assert leaves(value) == [1, 2, 3, 4]
    assert [where for where, _ in named_leaves(value)] == ["['a'].one", "['a'].other[0].one", "['a'].other[0].other[0]", "['b']"]


def test_a_tensor_a_class_and_nothing_are_leaves() -> None:
    tensor = torch.zeros(2)
    assert leaves(tensor)[0] is tensor
    assert leaves(Pair) == [Pair]
    assert leaves([]) == []
