"""Importance and weights from data: a harmless candidate costs nothing, groups do not change the answer, refitting helps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fxmerge
from fxmerge.measure.latency import worthwhile
from tests.fakes import PriceTimer
from tests.small import images, network


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
    reference = findings.graph(data)
    for proposal in proposals[:6]:
        for candidate in proposal.candidates:
            if candidate.kind == "fitted":
                continue  # its weights are not kept; the identity and composed ones need none
            plan = fxmerge.Plan(findings.fingerprint, (candidate,))
            student = fxmerge.linearize(fxmerge.annotate(findings.graph, plan))
            with torch.no_grad():
                loss = float(fxmerge.measure.divergence.divergence(reference, student(data)).mean())  # type: ignore[attr-defined]
            assert table.loss(candidate.id) == pytest.approx(min(loss, 1e6), rel=1e-2, abs=1e-6)


def test_small_memory_means_more_groups_and_the_same_losses(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    scorer = fxmerge.Reconstruction()
    whole = fxmerge.measure_importance(findings, proposals, images(32), scorer=scorer)
    little = fxmerge.measure_importance(findings, proposals, images(32), scorer=dataclasses.replace(scorer, memory_bytes=1))
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
