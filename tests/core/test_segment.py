"""Candidates and refusals as values: names, text, JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.segment import Candidate, Reason, Refusal, Segment
from fxmerge.errors import PlanError
from tests.core.test_expression import apply, norm, program

SQUARE = Axis.convolution(5, 1, (2, 2), 1)
CANDIDATE = Candidate(
    "x", "bn2", "relu", "composed", Geometry(4, 8, (SQUARE, SQUARE), 2, True), ("relu_1",), ("conv1", "bn1"), False
)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "x->relu composed 4->8 5x5 g2 pruned"),
        ({"removed": ()}, "x->relu composed 4->8 5x5 g2"),
        ({"kind": "fitted", "removed": ()}, "x->relu fitted 4->8 5x5 g2"),
        ({"kind": "identity", "removed": ()}, "x->relu identity"),
    ],
)
def test_the_id_says_where_how_and_what(changes: dict[str, Any], text: str) -> None:
    assert replace(CANDIDATE, **changes).id == text


@pytest.mark.parametrize("exact", [True, False])
def test_a_candidate_survives_json(exact: bool) -> None:
    candidate = replace(CANDIDATE, exact=exact)
    assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ({"kind": "melted"}, "not a candidate: .*unknown kind"),
        ({"entry": 3}, "a name that is no string"),
        ({"activations": [None]}, "a name that is no string"),
        ({"removed": None}, "not a candidate: TypeError"),
        ({"geometry": {"in_channels": 4}}, "not a candidate|not a geometry"),
        ({"geometry": 7}, "not a geometry"),
    ],
)
def test_damage_is_a_plan_error_that_says_what_was_found(damage: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        Candidate.from_json({**CANDIDATE.to_json(), **damage})


@pytest.mark.parametrize("field", ["entry", "exit", "end", "kind", "geometry", "activations", "removed", "exact"])
def test_a_missing_field_is_named(field: str) -> None:
    data = CANDIDATE.to_json()
    del data[field]
    with pytest.raises(PlanError, match=f"KeyError.'{field}'"):
        Candidate.from_json(data)


def test_a_refusal_prints_its_reason_and_what_was_found() -> None:
    assert str(Refusal("mul", Reason.OPAQUE)) == "mul: opaque node"
    assert str(Refusal("a", Reason.USED_OUTSIDE, "mul reads it", "advice")) == "a: tensor used outside (mul reads it)"


def test_a_segment_names_its_convolutions_and_prints_its_ends() -> None:
    expression = program(apply("conv1", 0), norm("bn1", 1), apply("conv2", 2))
    nodes = ("conv1", "bn1", "relu", "conv2", "relu_1")
    segment = Segment("x", "conv2", "relu_1", nodes, ("relu",), expression)
    assert segment.convolutions == ("conv1", "conv2")
    assert str(segment) == "x -> relu_1"


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_comes_with_what_would_help(reason: Reason) -> None:
    assert len(Refusal("conv", reason).advice) > 10
    assert Refusal("conv", reason, advice="buy a new one").advice == "buy a new one"
