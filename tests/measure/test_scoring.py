"""Rough scores first: what no good plan wants is scored on few images, and the plans stay what they were."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import fxmerge
from fxmerge.core.table import Importance, ImportanceTable
from fxmerge.measure.latency import worthwhile
from fxmerge.measure.screening import wanted
from tests.fakes import PriceTimer
from tests.small import images, network


@pytest.fixture(scope="module")
def tables():  # type: ignore[no-untyped-def]
    findings = fxmerge.find_segments(fxmerge.trace(network(), images(4)))
    latency = fxmerge.measure_latency(findings, fxmerge.propose(findings), images(4), timer=PriceTimer())
    proposals = worthwhile(fxmerge.propose(findings), latency, findings.region)
    whole = fxmerge.measure_importance(findings, proposals, images(64))
    return findings, proposals, latency, whole


def test_with_latencies_only_candidates_that_matter_are_scored_on_all_images(tables) -> None:  # type: ignore[no-untyped-def]
    findings, proposals, latency, whole = tables
    scorer = fxmerge.Reconstruction(score_images=64, coarse_images=8)
    table = fxmerge.measure_importance(findings, proposals, images(64), scorer=scorer, latency=latency)
    assert list(table.candidates) == list(whole.candidates)
    samples = {name: found.samples for name, found in table.candidates.items()}
    assert {8, 16} <= set(samples.values()) <= {0, 8, 16}  # of 64 images a quarter is held out
    for name, found in table.candidates.items():
        if found.samples == 16:
            assert found.loss == pytest.approx(whole.loss(name), rel=1e-3, abs=1e-7)
    candidates = [c for p in proposals for c in p.candidates]
    fronts = [fxmerge.solve(findings.region, candidates, latency, t, findings.fingerprint) for t in (table, whole)]
    for budget in (0.9, 0.7, 0.5):
        rough, exact = (front.pick(int(front.original_ns * budget)) for front in fronts)
        assert sum(whole.loss(c.id) for c in rough.merges) <= 1.1 * exact.loss + 1e-6


def test_what_the_rough_front_takes_is_wanted_and_what_is_beaten_by_far_is_not(tables) -> None:  # type: ignore[no-untyped-def]
    findings, proposals, latency, whole = tables
    kept = wanted(findings.region, proposals, latency, whole, findings.fingerprint)
    candidates = [c for p in proposals for c in p.candidates]
    front = fxmerge.solve(findings.region, candidates, latency, whole, findings.fingerprint)
    inside = [i for i in range(len(front)) if front.losses[i] <= 2]
    assert {c.id for i in inside for c in front.plan(i).merges} <= kept
    assert len(kept) < len(candidates)
    proposal = max(proposals, key=lambda p: len(p.candidates))
    worse = {c.id: Importance(1.5, 8, "made up") for c in proposal.candidates}
    best = min(proposal.candidates, key=lambda c: latency.candidate_ns(c.id))
    worse[best.id] = Importance(0.001, 8, "made up")
    table = ImportanceTable({**whole.candidates, **worse})
    kept = wanted(findings.region, proposals, latency, table, findings.fingerprint)
    assert not kept & ({c.id for c in proposal.candidates} - {best.id})


@pytest.mark.parametrize(
    "give",
    [
        lambda asked: {},
        lambda asked: {"zz": Importance(0.0, 1, "mine")},
        lambda asked: dict.fromkeys(asked, 0.5),
        lambda asked: dict.fromkeys(asked, Importance(float("nan"), 1, "mine")),
        lambda asked: None,
    ],
)
def test_a_scorer_that_gives_nonsense_is_told_and_nothing_is_kept(tables, tmp_path: Path, give) -> None:  # type: ignore[no-untyped-def]
    findings, proposals, _, _ = tables

    class Nonsense:
        settings = "nonsense"

        def tasks(self, findings, proposals, at_least):  # type: ignore[no-untyped-def]
            return [[proposal] for proposal in proposals]

        def prepare(self, findings, batches):  # type: ignore[no-untyped-def]
            return lambda proposals: give([c.id for p in proposals for c in p.candidates])

    with fxmerge.Store(tmp_path / "tables.db") as store:
        with pytest.raises(fxmerge.InputError, match="the scorer nonsense"):
            fxmerge.measure_importance(findings, proposals, images(8), scorer=Nonsense(), store=store)
        assert store._file._connection.execute("SELECT count(*) FROM importance").fetchone() == (0,)


def test_what_is_no_scorer_or_executor_is_told(tables) -> None:  # type: ignore[no-untyped-def]
    findings, proposals, _, _ = tables
    with pytest.raises(fxmerge.InputError, match="scorer must be a Scorer"):
        fxmerge.measure_importance(findings, proposals, images(8), scorer="reconstruction")  # type: ignore[arg-type]
    with pytest.raises(fxmerge.InputError, match="unknown executor 'cloud'"):
        fxmerge.measure_importance(findings, proposals, images(8), executor="cloud")  # type: ignore[arg-type]
    with pytest.raises(fxmerge.InputError, match="executor must be an Executor"):
        fxmerge.measure_importance(findings, proposals, images(8), executor=5)  # type: ignore[arg-type]


def test_candidates_too_large_for_the_memory_are_left_out_and_told(tables) -> None:  # type: ignore[no-untyped-def]
    findings, proposals, latency, whole = tables
    small = fxmerge.Reconstruction(memory_bytes=300_000)
    with pytest.warns(UserWarning, match="candidates have normal equations of more than memory_bytes=300,000"):
        table = fxmerge.measure_importance(findings, proposals, images(64), scorer=small)
    assert 0 < len(table.candidates) < len(whole.candidates)
    for name in table.candidates:
        assert table.loss(name) == pytest.approx(whole.loss(name), rel=1e-3, abs=1e-6)
    candidates = [c for p in proposals for c in p.candidates]
    few, all_ = (fxmerge.solve(findings.region, candidates, latency, t, findings.fingerprint) for t in (table, whole))
    assert few.fastest_ns < few.original_ns
    assert {merge.id for i in range(len(few)) for merge in few.plan(i).merges} <= table.candidates.keys()
    assert not {merge.id for i in range(len(all_)) for merge in all_.plan(i).merges} <= table.candidates.keys()


def test_no_batch_takes_more_than_its_share_of_memory(tables, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    findings, proposals, _, whole = tables
    seen = []
    real = fxmerge.measure.replay.Replay.values

    def values(self, arguments, **options):  # type: ignore[no-untyped-def]
        seen.append(len(arguments[0]))
        return real(self, arguments, **options)

    monkeypatch.setattr(fxmerge.measure.replay.Replay, "values", values)
    some = [fxmerge.Proposal(p.segment, tuple(c for c in p.candidates if c.kind != "fitted")) for p in proposals][:2]
    table = fxmerge.measure_importance(findings, some, images(64), scorer=fxmerge.Reconstruction(memory_bytes=2_000_000))
    assert max(seen) <= 64 // 4
    for name in table.candidates:
        assert table.loss(name) == pytest.approx(whole.loss(name), rel=1e-3, abs=1e-6)


def test_candidates_are_told_apart_by_fits_to_few_images(tables) -> None:  # type: ignore[no-untyped-def]
    findings, _, _, _ = tables
    scorer = fxmerge.Reconstruction(score_images=64, coarse_images=4)
    coarse = scorer.coarse()
    assert coarse is not None
    assert (coarse.score_images, coarse.fit_images, coarse.rows_per_unknown) == (4, 32, 4)
    batches = fxmerge.as_batches(images(64), findings.graph)
    assert sum(len(batch[0]) for batch in coarse.work(findings, batches).batches) == 32
    assert sum(len(batch[0]) for batch in scorer.work(findings, batches).batches) == 64
    assert fxmerge.Reconstruction(score_images=4, coarse_images=4).coarse() is None


def test_tasks_hold_every_candidate_once(tables) -> None:  # type: ignore[no-untyped-def]
    findings, proposals, _, _ = tables
    for at_least in (1, 4, 1000):
        tasks = fxmerge.Reconstruction().tasks(findings, proposals, at_least)
        assert [c for task in tasks for p in task for c in p.candidates] == [c for p in proposals for c in p.candidates]
    assert len(fxmerge.Reconstruction().tasks(findings, proposals, 4)) > 2


def test_the_settings_name_all_that_decides_a_score() -> None:
    base = fxmerge.Reconstruction()
    numbers = {field.name for field in dataclasses.fields(base)} - {"divergence", "shares", "coarse_images", "through", "stay"}
    changed = [dataclasses.replace(base, **{name: 2 * (getattr(base, name) or 1) + 1}) for name in numbers]
    assert len({scorer.settings for scorer in (base, *changed)}) == 1 + len(numbers) >= 8
    assert dataclasses.replace(base, through=0, stay=False).settings == base.settings
    assert dataclasses.replace(base, coarse_images=3).settings == base.settings
    assert dataclasses.replace(base, divergence=len).settings != base.settings
    assert dataclasses.replace(base, shares=len).settings != base.settings
    assert "0x" not in dataclasses.replace(base, divergence=fxmerge.measure.divergence.divergence).settings
