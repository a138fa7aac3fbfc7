"""The student that is merged already computes what the one of many layers does, and trains as well."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.testing import assert_equivalent
from fxmerge.tune import Recipe, already_merged, calibrate_norms, fine_tune
from tests.small import images
from tests.test_norms import blocks, inputs, offered
from tests.tune.small import made


@pytest.mark.parametrize("norms", [False, True])
def test_it_computes_what_the_student_of_many_layers_does(norms: bool) -> None:
    graph = fxmerge.trace(made().network.double(), images(4).double())
    made().network.float()
    plan, weights = already_merged(graph, made().composed_plan)
    assert {merge.kind for merge in plan.merges} == {"fitted"}
    one = fxmerge.linearize(fxmerge.annotate(graph, plan), weights=weights, norms=norms)
    many = fxmerge.linearize(fxmerge.annotate(graph, made().composed_plan))
    assert_equivalent(many, one.eval(), [images(3).double(), torch.randn(1, 3, 9, 17, dtype=torch.float64)])

    def convolutions(network: nn.Module) -> int:
        return sum(isinstance(module, nn.Conv2d) for module in network.modules())

    assert convolutions(one) == convolutions(many) - 2


def test_weights_that_were_fitted_are_kept() -> None:
    weights = fxmerge.fit(fxmerge.find_segments(made().graph), made().plan, images(64))
    plan, known = already_merged(made().graph, made().plan, weights=weights)
    fitted = made().plan.merges[0]
    assert plan.merges[0] == fitted
    assert known[fitted.id] is weights[fitted.id]
    assert set(known) == {merge.id for merge in plan.merges} | set(weights)


def test_what_stands_for_norms_is_multiplied_in() -> None:
    graph = blocks("group").graph
    merge = next(c for c in offered("group") if c.kind == "composed" and c.norms and not c.moved and not takes_from_outside(c))
    plan = fxmerge.Plan(blocks("group").fingerprint, (merge,))
    weights = fxmerge.fit(blocks("group"), plan, [inputs(32)])
    assert any(name != merge.id for name in weights)
    one, known = already_merged(graph, plan, weights=weights)
    assert [made.kind for made in one.merges] == ["fitted"]
    many = fxmerge.linearize(fxmerge.annotate(graph, plan), weights=weights)
    assert_equivalent(many, fxmerge.linearize(fxmerge.annotate(graph, one), weights=known), [inputs(3, seed=1)])


def takes_from_outside(candidate: fxmerge.Candidate) -> bool:
    """Whether its segment takes a tensor from outside."""
    [sides] = [p.segment.expression.sides for p in fxmerge.propose(blocks("group")) if candidate in p.candidates]
    return bool(sides)


def test_trained_it_obeys_the_law() -> None:
    plan, weights = already_merged(made().graph, made().composed_plan)
    student = fxmerge.linearize(fxmerge.annotate(made().graph, plan), weights=weights, norms=True)
    calibrate_norms(student, [(images(64),)])
    pairs = [(images(16, seed), torch.arange(16) % 5) for seed in range(3)]
    trained = fine_tune(student, pairs, teacher=made().graph, recipe=Recipe(epochs=1)).double()
    assert_equivalent(trained, fxmerge.fuse(fxmerge.annotate(trained, plan)), [images(3).double()])
