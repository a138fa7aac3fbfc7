"""Data, labels, loss and metric that do not fit the student: which batch, what was found there, what is wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxmerge
from fxmerge.tune import Distillation, Recipe, fine_tune
from tests.small import images
from tests.tune.small import made

GOOD = (images(8), torch.arange(8) % 5)


def train(second: Any, *, teacher: nn.Module | None = None, validation: Any = None, **numbers: Any) -> None:
    """On one good batch, and on another."""
    fine_tune(made().with_norms, [GOOD, second], teacher=teacher, validation=validation, recipe=Recipe(epochs=1, **numbers))


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (torch.zeros(8, 1, 12, 12), "8x1x12x12 float32"),
        (torch.zeros(8, 12), "8x12 float32"),
        (torch.zeros(8, 3, 12, 12, dtype=torch.uint8), "8x3x12x12 uint8"),
        (torch.zeros(8, 3, 12, 12, dtype=torch.float64), "8x3x12x12 float64"),
        (torch.zeros(8, 3, 0, 0), "8x3x0x0 float32"),
        ("a picture", "'a picture'"),
        ((GOOD[0], GOOD[0]), "8x3x12x12 float32, 8x3x12x12 float32"),
    ],
    ids=["channels", "no image", "bytes", "double", "no pixels", "no tensor", "two inputs"],
)
@pytest.mark.filterwarnings("ignore:.*zero-element")
def test_inputs_that_the_student_cannot_take(inputs: Any, found: str) -> None:
    pattern = rf"batch 1 of epoch 1 cannot be trained on: the student cannot take inputs \({found}\); it was traced with "
    with pytest.raises(fxmerge.InputError, match=rf"{pattern}\(4x3x12x12 float32\): give images of such"):
        train((inputs, GOOD[1]))


def test_images_of_a_size_that_the_student_is_not_made_for() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5)).eval()
    with pytest.raises(fxmerge.InputError, match=r"inputs \(8x3x16x16 float32\); it was traced with \(2x3x12x12 float32"):
        fine_tune(fxmerge.trace(network, images(2)), [(torch.zeros(8, 3, 16, 16), GOOD[1])])


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.full((8,), 5), r"a label is 5; the network knows classes 0 to 4"),
        (torch.full((8,), -1), r"a label is -1"),
        (torch.zeros(7, dtype=torch.int64), r"7 int64 \(labels are 7 int64; outputs of 8x5 float32 want"),
        (torch.zeros(8, dtype=torch.int32), r"8x5 float32 with labels 8 int32"),
        (torch.zeros(8), r"8x5 float32 with labels 8 float32"),
        (["cat"] * 8, r"with labels \('cat'"),
    ],
    ids=["too large", "negative", "too few", "int32", "floating", "names"],
)
def test_labels_that_the_loss_cannot_take(labels: Any, reason: str) -> None:
    with pytest.raises(fxmerge.InputError, match=rf"batch 1 of epoch 1 cannot be trained on: the loss cannot compare .*{reason}"):
        train((GOOD[0], labels))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.full((8,), 5), "a label is 5"),
        (torch.zeros(8, 1, dtype=torch.int64), "labels are 8x1 int64"),
        (torch.zeros(8), "labels are 8 float32"),
    ],
    ids=["too large", "a column", "floating"],
)
def test_labels_that_the_metric_would_count_as_wrong_without_a_word(labels: Any, reason: str) -> None:
    pattern = rf"batch 1 of validation cannot be judged: the metric cannot compare outputs 8x5 float32 with labels .*{reason}"
    with pytest.raises(fxmerge.InputError, match=pattern):
        train(GOOD, validation=[GOOD, (GOOD[0], labels)])


def test_images_to_be_judged_by_that_the_student_cannot_take() -> None:
    with pytest.raises(fxmerge.InputError, match=r"batch 0 of validation cannot be judged: the student cannot take inputs \(8x1x"):
        train(GOOD, validation=[(torch.zeros(8, 1, 12, 12), GOOD[1])])


def test_a_batch_that_is_no_pair_is_told_with_its_number() -> None:
    with pytest.raises(fxmerge.InputError, match=r"pairs, .*; batch 1 of epoch 1 is a Tensor, 8x3x12x12 float32"):
        train(GOOD[0])
    with pytest.raises(fxmerge.InputError, match=r"pairs, .*; batch 0 is a dict"):
        train(GOOD, validation=[{"image": GOOD[0]}])


def test_a_teacher_of_another_task() -> None:
    other = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(fxmerge.InputError, match=r"outputs of the student, 8x5 float32, and of the teacher, 8x7 float32, cannot"):
        train(GOOD, teacher=other)
    with pytest.raises(fxmerge.InputError, match=r"the teacher cannot take inputs \(8x3x12x12 float32\): RuntimeError"):
        train(GOOD, teacher=nn.Conv2d(1, 1, 1))


def each_by_itself(outputs: Any, labels: Any) -> Any:
    return F.cross_entropy(outputs, labels, reduction="none")


def a_number(outputs: Any, labels: Any) -> Any:
    return 1.0


def test_a_loss_that_is_no_mean_and_a_metric_that_is_no_tensor() -> None:
    with pytest.raises(fxmerge.InputError, match=r"loss must give one number, a mean over the batch; found 8 float32"):
        train(GOOD, loss=each_by_itself)
    with pytest.raises(fxmerge.InputError, match=r"loss must give one number, .* found 1.0"):
        train(GOOD, loss=a_number)
    with pytest.raises(fxmerge.InputError, match=r"metric must give a tensor with a number for each image, found float"):
        train(GOOD, validation=[GOOD], metric=a_number)


def out_of_memory(outputs: Any, labels: Any) -> Any:
    raise torch.OutOfMemoryError("all of it")


def test_the_end_of_memory_is_no_matter_of_fit() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="all of it"):
        train(GOOD, loss=out_of_memory)


def test_the_cause_is_kept() -> None:
    with pytest.raises(fxmerge.InputError, match="cannot take") as caught:
        train((torch.zeros(8, 1, 12, 12), GOOD[1]))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(("match", "found"), [(lambda a, b: (a - b) ** 2, r"8x5 float32"), (lambda a, b: None, "None")])
def test_a_match_of_outputs_that_gives_no_mean(match: Any, found: str) -> None:
    with pytest.raises(fxmerge.InputError, match=f"match must give one number, a mean over the batch; found .*{found}"):
        train(GOOD, teacher=made().graph, distillation=Distillation(match=match))
