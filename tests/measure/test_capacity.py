"""Convolutions and weights that are gone count as losses, as many as the merged network has fewer; not where nobody asks for it."""

from __future__ import annotations

import pytest
from torch import nn
from torch.fx import GraphModule

import fxmerge
from tests.small import images, network

CAPACITY = 3.0


@pytest.fixture(scope="module")
def found() -> tuple[fxmerge.Findings, tuple[fxmerge.Proposal, ...]]:
    findings = fxmerge.find_segments(fxmerge.trace(network(), images(4)))
    return findings, fxmerge.propose(findings)


def held(graph: GraphModule) -> tuple[int, int]:
    """Convolutions of a graph, and weights in them."""
    convolutions = [module for module in graph.modules() if isinstance(module, nn.Conv2d)]
    return len(convolutions), sum(module.weight.numel() for module in convolutions)


def lost(findings: fxmerge.Findings, plan: fxmerge.Plan) -> float:
    """Counted on the merged network."""
    (count, weights), (now, weights_now) = held(findings.graph), held(fxmerge.fuse(student(findings, plan)))
    return (count - now) / count + (weights - weights_now) / weights


def student(findings: fxmerge.Findings, plan: fxmerge.Plan) -> GraphModule:
    return fxmerge.linearize(fxmerge.annotate(findings.graph, plan))


def test_a_loss_grows_by_the_shares_that_the_merged_network_lacks(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    data = images(64)
    plain, counted = (
        fxmerge.measure_importance(findings, proposals, data, scorer=fxmerge.Reconstruction(capacity=capacity, hopeless=1e9))
        for capacity in (0.0, CAPACITY)
    )
    compared, kinds = 0, set()
    for candidate in (c for p in proposals for c in p.candidates):
        more = counted.loss(candidate.id) - plain.loss(candidate.id)
        if candidate.exact:
            assert more == 0
            continue
        share = lost(findings, fxmerge.Plan(findings.fingerprint, (candidate,)))
        if plain.loss(candidate.id) < 100 and share >= 0:
            larger = (
                held(fxmerge.fuse(student(findings, fxmerge.Plan(findings.fingerprint, (candidate,)))))[1] > held(findings.graph)[1]
            )
            assert larger or more == pytest.approx(CAPACITY * share, abs=1e-5)
            compared, kinds = compared + (not larger), kinds | {candidate.kind}
        assert more >= 0
    assert compared > 10
    assert kinds == {"composed", "fitted", "identity"}


def test_plans_that_are_compared_lose_what_they_take(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    batches = fxmerge.as_batches(images(64), findings.graph)
    merge = next(c for p in proposals for c in p.candidates if c.kind == "identity")
    plan = fxmerge.Plan(findings.fingerprint, (merge,))
    plain, counted = fxmerge.Reconstruction(), fxmerge.Reconstruction(capacity=CAPACITY)
    more = CAPACITY * lost(findings, plan)
    assert more > 0.1
    assert counted.held_out_loss(findings, plan, batches) == pytest.approx(plain.held_out_loss(findings, plan, batches) + more)
    assert counted.rough(findings, batches)(plan) == pytest.approx(plain.rough(findings, batches)(plan) + more)


def test_scores_with_it_are_kept_apart_and_those_without_keep_their_name() -> None:
    plain, counted = fxmerge.Reconstruction(), fxmerge.Reconstruction(capacity=CAPACITY)
    assert "capacity" not in plain.settings
    assert counted.settings == f"{plain.settings} capacity=3.0"


@pytest.mark.parametrize("capacity", [-1.0, float("nan"), float("inf"), "3"])
def test_what_is_no_capacity_is_told(capacity: object) -> None:
    with pytest.raises(fxmerge.InputError, match="capacity must be a number from 0 on"):
        fxmerge.Reconstruction(capacity=capacity)  # type: ignore[arg-type]
