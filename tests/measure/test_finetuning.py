"""Scorers that look at the network whole: the published one, and a function of one's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import fxmerge
from fxmerge.errors import InputError
from fxmerge.measure.divergence import divergence
from tests.laws import held_out
from tests.small import images, network

BATCHES = [(images(32, seed=s), torch.arange(32) % 5) for s in range(3)]


@pytest.fixture(scope="module")
def found() -> tuple[fxmerge.Findings, tuple[fxmerge.Proposal, ...]]:
    findings = fxmerge.find_segments(fxmerge.trace(network(blocks=1), images(4)))
    return findings, fxmerge.propose(findings)[2:6]


def test_without_steps_the_published_scorer_tells_what_replacing_alone_costs(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    scorer = fxmerge.FineTuning(train=[], holdout=BATCHES, steps=0, metric="loss")
    table = fxmerge.measure_importance(findings, proposals, images(32), scorer=scorer)
    before = sum(scorer.loss(findings.graph(x), y).item() for x, y in BATCHES) / 3
    composed = [c for p in proposals for c in p.candidates if c.kind != "fitted"]
    assert composed
    for candidate in composed:
        plan = fxmerge.Plan(findings.fingerprint, (candidate,))
        student = fxmerge.linearize(fxmerge.annotate(findings.graph, plan)).eval()
        after = sum(scorer.loss(student(x), y).item() for x, y in BATCHES) / 3
        assert table.loss(candidate.id) == pytest.approx(after - before, rel=1e-4, abs=1e-6)
        assert table.candidates[candidate.id].samples == 96


def test_steps_of_training_lower_the_loss_and_leave_the_original_alone(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    before = {name: p.clone() for name, p in findings.graph.named_parameters()}
    losses = []
    for steps in (0, 30):
        scorer = fxmerge.FineTuning(train=BATCHES, holdout=BATCHES, steps=steps, learning_rate=0.02, metric="loss")
        table = fxmerge.measure_importance(findings, proposals, images(32), scorer=scorer)
        losses.append([table.loss(c.id) for p in proposals for c in p.candidates if not c.exact])
    assert all(later <= first for first, later in zip(*losses, strict=True))
    assert sum(losses[1]) < 0.5 * sum(losses[0])
    assert all(torch.equal(p, before[name]) for name, p in findings.graph.named_parameters())


def test_accuracy_is_the_part_that_is_right(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    right = [(x, findings.graph(x).argmax(1)) for x, _ in BATCHES]
    scorer = fxmerge.FineTuning(train=[], holdout=right, steps=0)
    table = fxmerge.measure_importance(findings, proposals, images(32), scorer=scorer)
    worst = max(table.candidates.values(), key=lambda i: i.loss)
    assert 0 < worst.loss <= 1
    assert (worst.loss * 96) == pytest.approx(round(worst.loss * 96))


def test_settings_tell_apart_what_gives_other_scores() -> None:
    base = fxmerge.FineTuning(train=BATCHES, holdout=BATCHES)
    others = [
        dataclasses.replace(base, steps=3),
        dataclasses.replace(base, metric="loss"),
        dataclasses.replace(base, holdout=BATCHES[:1]),
        dataclasses.replace(base, fit=fxmerge.Reconstruction(ridge=1.0)),
    ]
    assert len({scorer.settings for scorer in (base, *others)}) == 5
    assert dataclasses.replace(base).settings == base.settings


def test_losses_that_differ_are_told_apart() -> None:
    base = fxmerge.FineTuning(train=BATCHES, holdout=BATCHES)
    losses = [
        torch.nn.CrossEntropyLoss(),
        torch.nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda a, b: a.sum(),
        lambda a, b: b.sum(),
    ]
    assert len({dataclasses.replace(base, loss=loss).settings for loss in losses}) == 4
    assert len({dataclasses.replace(base, loss=torch.nn.CrossEntropyLoss()).settings for _ in range(2)}) == 1
    divergences = [lambda a, b: a.sum(), lambda a, b: b.sum(), None, divergence]
    assert len({fxmerge.Reconstruction(divergence=one).settings for one in divergences}) == 3


def test_a_holdout_that_does_not_fit_is_told(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    for labels in (torch.arange(7), None):
        scorer = fxmerge.FineTuning(train=[], holdout=[(images(8), labels)], steps=0)
        with pytest.raises(InputError, match="the hold-out cannot be judged by accuracy"):
            fxmerge.measure_importance(findings, proposals, images(8), scorer=scorer)


def test_a_function_of_ones_own_sees_the_merged_network(found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    seen = []
    held, _ = held_out(images(32), findings.graph)

    def judge(original, merged, batches) -> float:  # type: ignore[no-untyped-def]
        seen.append(sum(isinstance(m, torch.nn.Conv2d) for m in merged.modules()))
        return divergence(original(held), merged(held)).mean().item()

    table = fxmerge.measure_importance(findings, proposals, images(32), scorer=fxmerge.Custom("mine", judge))
    closed = fxmerge.measure_importance(findings, proposals, images(32))
    candidates = [c for p in proposals for c in p.candidates if not c.exact]
    assert len(seen) == len(candidates)
    for candidate in candidates:
        # Above 1 closed-form scoring may have stopped early; fitted weights are fitted to all images here.
        if closed.loss(candidate.id) < 1 and candidate.kind != "fitted":
            assert table.loss(candidate.id) == pytest.approx(closed.loss(candidate.id), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("given", [float("nan"), -1.0, "much", None, True, torch.ones(2)])
def test_a_function_that_gives_nonsense_is_told(found, given: object) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    scorer = fxmerge.Custom("mine", lambda *_: given)  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="the scorer 'mine' gave .* expected a finite number from 0 on"):
        fxmerge.measure_importance(findings, proposals, images(8), scorer=scorer)


def test_bad_options_are_told() -> None:
    with pytest.raises(InputError, match="\\(inputs, labels\\) pairs"):
        fxmerge.FineTuning(train=[images(3)], holdout=BATCHES)  # type: ignore[list-item]
    with pytest.raises(InputError, match="found none"):
        fxmerge.FineTuning(train=[], holdout=BATCHES)
    with pytest.raises(InputError, match="steps must be a whole number from 0 on"):
        fxmerge.FineTuning(train=BATCHES, holdout=BATCHES, steps=-1)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((images(8)[:, :2], torch.arange(8) % 5), r"batch 1 of train \(inputs 8x2x12x12 float32, labels 8 int64\) .* channels"),
        ((images(8), torch.arange(8)), r"batch 1 of train .* cannot be trained on: IndexError: Target . is out of bounds"),
        ((images(8), torch.arange(7) % 5), r"labels 7 int64\) cannot be trained on: ValueError: Expected input batch_size"),
        ((images(8), torch.rand(8)), "labels 8 float32. cannot be trained on: RuntimeError"),
        ((images(8), None), "labels None. cannot be trained on: "),
        ((images(8).double(), torch.arange(8) % 5), "inputs 8x3x12x12 float64, labels 8 int64. cannot be trained on: RuntimeError"),
    ],
)
def test_training_data_that_does_not_fit_is_told_by_its_batch(found, train: object, message: str) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    scorer = fxmerge.FineTuning(train=[BATCHES[0], train], holdout=BATCHES, steps=3)  # type: ignore[list-item]
    with pytest.raises(InputError, match=message):
        fxmerge.measure_importance(findings, proposals, images(8), scorer=scorer)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(8), "a label is 5; the network knows classes 0 to 4"),
        (torch.full((8,), -1), "a label is -1; the network knows classes 0 to 4"),
        (torch.rand(8), "labels are 8 float32; outputs of 8x5 float32 want numbers of classes"),
        (torch.zeros(8, 5, dtype=torch.long), "labels are 8x5 int64"),
    ],
)
def test_a_holdout_of_labels_that_the_network_does_not_know_is_told(found, labels: torch.Tensor, message: str) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    scorer = fxmerge.FineTuning(train=[], holdout=[(images(8), labels)], steps=0)
    with pytest.raises(InputError, match=f"the hold-out cannot be judged by accuracy: ValueError: {message}"):
        fxmerge.measure_importance(findings, proposals, images(8), scorer=scorer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 3}, "train must hold .inputs, labels. pairs, found int"),
        ({"holdout": images(3)}, "holdout must hold .inputs, labels. pairs; batch 0 is Tensor 3x12x12 float32"),
        (
            {"train": [BATCHES[0], (images(0), torch.arange(0))]},
            "batch 1 of train holds no images: its inputs are 0x3x12x12 float32",
        ),
        ({"holdout": [((), torch.arange(3))]}, r"batch 0 of holdout holds no images: its inputs are \(\)"),
        ({"holdout": [(torch.tensor(3.0), torch.arange(3))]}, "holds no images: its inputs are a single number float32"),
        ({"steps": "3"}, "steps must be a whole number from 0 on, found '3'"),
        ({"steps": True}, "steps must be a whole number from 0 on"),
        ({"metric": "top5"}, "metric must be accuracy or loss, found 'top5'"),
        ({"learning_rate": "fast"}, "learning_rate must be a finite number from 0 on, found 'fast'"),
        ({"momentum": float("nan")}, "momentum must be a finite number from 0 on, found nan"),
        ({"weight_decay": -1}, "weight_decay must be a finite number from 0 on, found -1"),
    ],
)
def test_data_and_numbers_of_no_use_are_told_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxmerge.FineTuning(**{"train": BATCHES, "holdout": BATCHES, **options})  # type: ignore[arg-type]


def test_a_store_knows_a_custom_scorer_by_its_name_alone(found, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    some = [fxmerge.Proposal(p.segment, tuple(c for c in p.candidates if c.kind == "composed" and not c.exact)) for p in proposals]
    losses = []
    with fxmerge.Store(tmp_path / "tables.db") as store:
        for name, loss in (("mine", 1.0), ("mine", 2.0), ("mine 2", 2.0)):
            scorer = fxmerge.Custom(name, lambda *_, loss=loss: loss)
            table = fxmerge.measure_importance(findings, some, images(8), scorer=scorer, store=store)
            losses.append({found.loss for found in table.candidates.values()})
    assert losses == [{1.0}, {1.0}, {2.0}]
