"""Importance and weights from data: a harmless candidate costs nothing, groups do not change the answer, refitting helps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx, nn

import fxmerge
from fxmerge.measure.latency import worthwhile
from fxmerge.measure.replay import Replay
from tests.fakes import PriceTimer
from tests.laws import held_out
from tests.small import images, network
from tests.zoo import images as zoo_images
from tests.zoo import specimen


@pytest.fixture(scope="module")
def found() -> tuple[fxmerge.Findings, tuple[fxmerge.Proposal, ...]]:
    findings = fxmerge.find_segments(fxmerge.trace(network(), images(4)))
    return findings, fxmerge.propose(findings)


def test_every_candidate_gets_a_loss_that_a_whole_rebuilt_network_confirms(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    data = images(64)
    table = fxmerge.measure_importance(findings, proposals, data)
    ids = [c.id for p in proposals for c in p.candidates]
    assert set(ids) == set(table.candidates)
    judged, _ = held_out(data, findings.graph)
    reference = findings.graph(judged)
    for proposal in proposals[:6]:
        for candidate in proposal.candidates:
            if candidate.kind == "fitted":
                continue  # its weights are not kept; the identity and composed ones need none
            plan = fxmerge.Plan(findings.fingerprint, (candidate,))
            student = fxmerge.linearize(fxmerge.annotate(findings.graph, plan))
            with torch.no_grad():
                loss = float(fxmerge.measure.divergence.divergence(reference, student(judged)).mean())  # type: ignore[attr-defined]
            assert table.loss(candidate.id) == pytest.approx(min(loss, 1e6), rel=1e-2, abs=1e-6)


def test_a_kernel_in_groups_finds_the_map_that_has_these_groups_and_no_other() -> None:
    torch.manual_seed(0)
    middle = nn.Conv2d(8, 8, 3, padding=1)
    with torch.no_grad():
        for out in range(8):
            for channel in range(8):
                middle.weight[out, channel] *= out // 4 == channel // 4
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    findings = fxmerge.find_segments(fxmerge.trace(model, images(2)))
    proposals = fxmerge.propose(findings, fxmerge.Space(groups=(2, 4, 0)))
    table = fxmerge.measure_importance(findings, proposals, images(64))
    [own] = [p for p in proposals if p.segment.convolutions == ("_2",)]
    losses = {c.geometry.groups: table.loss(c.id) for c in own.candidates if c.kind == "fitted" and c.geometry.kernel == (3, 3)}
    assert set(losses) == {2, 4, 8}
    assert losses[2] < 1e-7
    assert losses[2] < 1e-3 * losses[4] < losses[8]
    [two] = [c for c in own.candidates if c.kind == "fitted" and c.geometry.groups == 2 and c.geometry.kernel == (3, 3)]
    plan = fxmerge.Plan(findings.fingerprint, (two,))
    weights = fxmerge.fit(findings, plan, images(64), scorer=fxmerge.Reconstruction(ridge=1e-12))
    merged = fxmerge.fuse(fxmerge.linearize(fxmerge.annotate(findings.graph, plan), weights=weights))
    assert [m.groups for m in merged.modules() if isinstance(m, nn.Conv2d)] == [1, 2, 1]
    assert torch.allclose(merged(images(5, seed=3)), model(images(5, seed=3)), atol=1e-5)


def test_candidates_that_make_the_image_larger_are_scored_and_fitted_as_they_are_built() -> None:
    model, data = specimen("decoder"), zoo_images("decoder", batch=16)
    findings = fxmerge.find_segments(fxmerge.trace(model, data[:2]))
    proposals = [p for p in fxmerge.propose(findings) if str(p.segment) == "relu -> relu_1"]
    losses = fxmerge.measure_importance(findings, proposals, data)
    judged, others = held_out(data, findings.graph)
    [composed, largest, small] = proposals[0].candidates
    assert (composed.exact, losses.loss(composed.id)) == (True, 0.0)
    assert losses.loss(largest.id) < 1e-6  # what it is fitted to is such a map
    assert losses.loss(small.id) > 1e-3
    for candidate, loss in ((largest, 1e-6), (small, losses.loss(small.id))):
        plan = fxmerge.Plan(findings.fingerprint, (candidate,))
        weights = fxmerge.fit(findings, plan, others, scorer=fxmerge.Reconstruction().alone())
        student = fxmerge.linearize(fxmerge.annotate(findings.graph, plan), weights=weights)
        with torch.no_grad():
            found = fxmerge.measure.divergence.divergence(findings.graph(judged), student(judged))  # type: ignore[attr-defined]
        assert float(found.mean()) == pytest.approx(loss, rel=1e-3, abs=1e-6)


def test_small_memory_means_more_groups_and_the_same_losses(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    scorer = fxmerge.Reconstruction()
    whole = fxmerge.measure_importance(findings, proposals, images(32), scorer=scorer)
    small = dataclasses.replace(scorer, memory_bytes=4_000_000)
    assert len(small.tasks(findings, proposals, 1)) > len(scorer.tasks(findings, proposals, 1)) == 1
    little = fxmerge.measure_importance(findings, proposals, images(32), scorer=small)
    for name, importance in whole.candidates.items():
        assert little.loss(name) == pytest.approx(importance.loss, rel=1e-3, abs=1e-7)


def test_a_larger_fitted_kernel_is_no_worse_at_the_exit(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    data = images(128)
    segment = next(p for p in proposals if len(p.segment.convolutions) == 2 and p.segment.activations)
    fitted = [c for c in segment.candidates if c.kind == "fitted"]
    errors = []
    for candidate in fitted:
        plan = fxmerge.Plan(findings.fingerprint, (candidate,))
        weights = fxmerge.fit(findings, plan, data)
        student = fxmerge.linearize(
            fxmerge.annotate(findings.graph, fxmerge.Plan(findings.fingerprint, (candidate,))), weights=weights
        )
        seen = {}
        for name, graph in (("original", findings.graph), ("student", student)):
            replay = fxmerge.measure.replay.Replay(graph)  # type: ignore[attr-defined]
            with torch.no_grad():
                seen[name] = replay.values((data,))[replay.named[candidate.exit]]
        errors.append(float((seen["original"] - seen["student"]).norm()))
    assert [c.geometry.kernel[0] for c in fitted] == [5, 3, 1]
    assert errors[0] < errors[1] < errors[2]


def test_a_network_that_overflows_on_the_calibration_inputs_is_told(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    with pytest.raises(fxmerge.CalibrationError, match="gives NaN or infinity at"):
        fxmerge.measure_importance(findings, proposals, images(8).sign() * 3e38)


def test_what_is_slower_than_leaving_it_alone_is_not_scored(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    table = fxmerge.measure_latency(findings, proposals, (images(4),), timer=PriceTimer())
    kept = {c.id for p in worthwhile(proposals, table, findings.region) for c in p.candidates}
    dropped = {c.id for p in proposals for c in p.candidates} - kept
    assert kept
    assert all(table.candidate_ns(name) > 0 for name in dropped)


def test_equal_geometries_are_timed_once(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    timer = PriceTimer()
    table = fxmerge.measure_latency(findings, proposals, (images(4),), timer=timer)
    assert len(timer.asked) < len(table.candidates)
    assert sum(table.unit_ns(end) for end in table.units) + table.remainder_ns == table.network.median_ns


def test_a_plan_of_another_network_cannot_be_fitted(found) -> None:  # type: ignore[no-untyped-def]
    findings, _ = found
    plan = fxmerge.Plan("0" * 32)
    with pytest.raises(fxmerge.PlanMismatchError, match="made for another graph than these findings"):
        fxmerge.fit(findings, plan, images(8))


def test_a_plan_of_a_wider_search_cannot_be_fitted_and_the_segment_is_named(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    candidate = next(c for p in proposals if len(p.segment.convolutions) > 1 for c in p.candidates if c.kind == "fitted")
    narrow = fxmerge.find_segments(findings.graph, max_units=1)
    plan = fxmerge.Plan(findings.fingerprint, (candidate,))
    text = f"hold no segment {candidate.entry} -> {candidate.end} for the merge .*: give find_segments the max_units"
    with pytest.raises(fxmerge.PlanMismatchError, match=text) as caught:
        fxmerge.fit(narrow, plan, images(8))
    assert caught.value.node == candidate.exit


def test_one_module_under_two_names_is_replayed_under_both() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)))
    graph.add_submodule("twin", graph.get_submodule("0"))
    next(node for node in graph.graph.nodes if node.target == "2").target = "twin"
    graph.recompile()
    replay = Replay(graph)
    assert torch.equal(replay.values((images(2),))[replay.output], graph(images(2)))


def test_a_divergence_of_the_users_gets_the_outputs_as_they_are(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    scorer = fxmerge.Reconstruction(divergence=lambda a, b: torch.full((len(a),), 0.25))
    table = fxmerge.measure_importance(findings, proposals[:1], images(32), scorer=scorer)
    assert {importance.loss for importance in table.candidates.values() if importance.scorer != "exact"} == {0.25}


class Weighted:
    """A divergence with a number of its own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def divergence(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.factor * (one - other).square().mean(1)


def test_a_method_is_what_its_object_is(found, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """In a store, the scores of one object are not those of another of its class."""
    findings, proposals = found
    with fxmerge.Store(tmp_path / "tables.db") as store:
        scorers = [fxmerge.Reconstruction(divergence=Weighted(factor).divergence) for factor in (1.0, 100.0, 1.0)]
        small, large, again = (
            fxmerge.measure_importance(findings, proposals[:1], images(32), store=store, scorer=scorer) for scorer in scorers
        )
    name = max(small.candidates, key=small.loss)
    assert large.loss(name) == pytest.approx(100 * small.loss(name), rel=1e-5)
    assert again == small


@pytest.mark.parametrize("verb", ["fit", "score"])
def test_images_that_the_network_cannot_take_are_told_with_their_size(found, verb: str) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 2))
    findings = fxmerge.find_segments(fxmerge.trace(model.eval(), torch.zeros(2, 3, 4, 4)))
    proposals = fxmerge.propose(findings)
    plan = fxmerge.Plan(findings.fingerprint, (next(c for p in proposals for c in p.candidates if c.kind == "fitted"),))
    run = {"fit": lambda x: fxmerge.fit(findings, plan, x), "score": lambda x: fxmerge.measure_importance(findings, proposals, x)}
    with pytest.raises(fxmerge.CalibrationError, match=r"rejects calibration inputs of size \(\d, 3, 5, 5\)"):
        run[verb](torch.randn(8, 3, 5, 5))
