"""Tuning on unlabelled images brings a student nearer to its original, never farther, and keeps the law."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.measure.divergence import divergence
from fxmerge.testing import assert_equivalent, assert_untouched, snapshot
from fxmerge.tune import calibrate_norms, calibrated, calibration_tune
from tests.small import images
from tests.tune.small import disturbed, made


def distance(student: torch.nn.Module) -> float:
    with torch.no_grad():
        return float(divergence(made().network(images(64, 11)), student(images(64, 11))).mean())


@pytest.mark.parametrize("norms", [False, True])
def test_a_student_comes_nearer_to_its_original_on_images_it_has_not_seen(norms: bool) -> None:
    student = disturbed(made().with_norms if norms else made().fitted)
    before = snapshot(student)
    tuned = calibration_tune(student, made().graph, images(64), steps=60, batch_size=16)
    assert_untouched(student, before)
    assert not tuned.training
    assert distance(tuned) < 0.7 * distance(student)


def test_what_was_tuned_obeys_the_law() -> None:
    student = disturbed(made().with_norms).double()
    original = fxmerge.trace(made().network.double(), images(4).double())
    made().network.float()
    tuned = calibration_tune(student, original, images(64).double(), steps=10, batch_size=16)
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), tuned.parameters(), strict=True))
    again = fxmerge.fuse(fxmerge.annotate(tuned, made().plan))
    assert_equivalent(tuned, again, [images(3).double(), torch.randn(1, 3, 9, 17, dtype=torch.float64)])


@pytest.mark.parametrize("worse", [1.5, math.inf])  # going back to the best on the way, and at the end only
def test_a_step_size_far_too_large_leaves_the_student_no_worse(worse: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrated, "_WORSE", worse)
    tuned = calibration_tune(made().fitted, made().graph, images(64), steps=40, batch_size=16, step_size=200.0, held_out=0.5)
    assert distance(tuned) <= 1.05 * distance(made().fitted)


def test_the_same_seed_gives_the_same_student() -> None:
    one, two, other = (
        calibration_tune(disturbed(made().fitted), made().graph, images(32), steps=6, batch_size=8, seed=seed) for seed in (1, 1, 2)
    )
    assert_untouched(one, snapshot(two))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_pairs_are_taken_without_their_labels_and_augmented_for_both_networks() -> None:
    seen = []

    def flipped(batch: tuple[torch.Tensor, ...], generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        seen.append(len(batch))
        return (batch[0].flip(3),)

    pairs = [(images(16), torch.zeros(16)), (images(16, 1), torch.zeros(16))]
    told: list[tuple[int, int]] = []
    calibration_tune(
        made().fitted, made().graph, pairs, steps=3, batch_size=8, augment=flipped, progress=lambda *at: told.append(at)
    )
    assert seen == [1, 1, 1]
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_no_steps_give_a_copy() -> None:
    tuned = calibration_tune(made().fitted, made().graph, images(8), steps=0)
    assert tuned is not made().fitted
    assert_untouched(tuned, snapshot(made().fitted))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": -1}, "steps must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1"),
        ({"step_size": 0.0}, "step_size must be a positive"),
        ({"step_size": "small"}, "step_size must be a positive number, found 'small'"),
        ({"held_out": 1.0}, "held_out must be a fraction"),
        ({"limit": 0}, "limit must be a whole number from 2 on, found 0"),
    ],
)
def test_options_out_of_range_are_told(options: dict[str, float], told: str) -> None:
    with pytest.raises(fxmerge.InputError, match=told):
        calibration_tune(made().fitted, made().graph, images(8), **options)


def test_the_model_in_place_of_its_graph_is_told() -> None:
    with pytest.raises(
        fxmerge.InputError, match=r"original must be a GraphModule, as trace\(\) and linearize\(\) give, found Linear"
    ):
        calibration_tune(made().fitted, torch.nn.Linear(1, 1), images(8))  # type: ignore[arg-type]


def test_one_image_is_too_few() -> None:
    with pytest.raises(fxmerge.CalibrationError, match="two images at least"):
        calibration_tune(made().fitted, made().graph, images(1))


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"limit": -3}, {"limit": 2.5}, {"step_size": "a"}, {"held_out": None}, {"batch_size": 1.5}]
)
def test_options_that_are_no_such_numbers_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(fxmerge.InputError, match=next(iter(options))):
        calibration_tune(made().fitted, made().graph, images(8), **options)


def test_what_cannot_be_tuned_is_told() -> None:
    frozen = copy.deepcopy(made().fitted).requires_grad_(False)
    with pytest.raises(fxmerge.InputError, match="requires a gradient"):
        calibration_tune(frozen, made().graph, images(8))
    with pytest.raises(fxmerge.InputError, match="original must be a GraphModule"):
        calibration_tune(made().fitted, made().network, images(8))  # type: ignore[arg-type]


def test_it_tunes_in_inference_mode() -> None:
    with torch.inference_mode():
        tuned = calibration_tune(disturbed(made().fitted), made().graph, images(8), steps=2)
    assert all(not parameter.is_inference() for parameter in tuned.parameters())


class Scaled(torch.nn.Module):
    """Takes one number for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.two(self.one(x).relu()).relu() * factor
        return found


def test_items_of_different_numbers_for_all_their_images_are_all_seen() -> None:
    graph = fxmerge.trace(Scaled().eval(), (images(4), torch.tensor(1.0)))
    findings = fxmerge.find_segments(graph)
    fitted = next(c for p in fxmerge.propose(findings) for c in p.candidates if c.kind == "fitted")
    items = [(images(4, number), torch.tensor(float(number))) for number in range(5)]
    plan = fxmerge.Plan(findings.fingerprint, (fitted,))
    student = fxmerge.linearize(fxmerge.annotate(graph, plan), weights=fxmerge.fit(findings, plan, items))
    seen: set[float] = set()

    def noted(batch: Any, generator: torch.Generator) -> Any:
        seen.add(float(batch[1]))
        return batch

    calibration_tune(student, graph, items, steps=10, augment=noted)
    assert seen == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_images_that_have_a_history_get_no_gradient_and_serve_every_step() -> None:
    leaf = images(32).requires_grad_()
    for given in (leaf, leaf * 1.0):
        calibration_tune(made().fitted, made().graph, given, steps=3, batch_size=8)
    assert leaf.grad is None


def test_images_of_another_size_and_an_augmentation_that_gives_no_batch_are_told() -> None:
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 2)
    graph = fxmerge.trace(nn.Sequential(*layers).eval(), torch.zeros(2, 3, 4, 4))
    findings = fxmerge.find_segments(graph)
    merge = next(c for p in fxmerge.propose(findings) for c in p.candidates if c.kind == "fitted")
    student = fxmerge.linearize(fxmerge.annotate(graph, fxmerge.Plan(findings.fingerprint, (merge,))))
    for verb in (lambda x: calibration_tune(student, graph, x, steps=1), lambda x: calibrate_norms(student, x)):
        with pytest.raises(fxmerge.CalibrationError, match=r"rejects calibration inputs of size"):
            verb(torch.randn(8, 3, 5, 5))
    with pytest.raises(fxmerge.InputError, match="augment must give a batch, a tuple of the 1 arguments"):
        calibration_tune(made().fitted, made().graph, images(16), steps=1, augment=lambda batch, generator: batch[0])  # type: ignore[arg-type, return-value]
    with pytest.raises(fxmerge.InputError, match="seed must be a whole number"):
        calibration_tune(made().fitted, made().graph, images(16), steps=1, seed="a")  # type: ignore[arg-type]
