"""The student trains, its norms are set up without changing it, and what was trained merges again by the law."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import fxmerge
from fxmerge.measure.divergence import divergence
from fxmerge.testing import assert_equivalent, assert_untouched, snapshot
from tests.fakes import PriceTimer
from tests.small import images, network


@pytest.fixture(scope="module")
def result() -> fxmerge.Result:
    return fxmerge.compress(network(), images(4), speedup=1.4, calibration=images(64), timer=PriceTimer())


def batches() -> Iterable[tuple[Tensor, Tensor]]:
    for seed in range(3):
        yield images(16, seed), torch.arange(16) % 5


def test_calibrated_norms_leave_the_function_and_hold_the_statistics(result: fxmerge.Result) -> None:
    student = result.student_with_norms().double()
    before = copy.deepcopy(student)
    fxmerge.tune.calibrate_norms(student, [(images(64).double(),)])
    assert_equivalent(before, student, [images(5, 9).double()])
    norm = next(m for name, m in student.named_modules() if name.startswith("merged.") and hasattr(m, "running_mean"))
    assert float(norm.running_mean.abs().sum()) > 0


def test_training_changes_a_copy_and_what_is_trained_obeys_the_law(result: fxmerge.Result) -> None:
    student = result.student_with_norms()
    fxmerge.tune.calibrate_norms(student, [(images(64),)])
    before = snapshot(student)
    trained = fxmerge.tune.fine_tune(student, batches, teacher=network(), epochs=2)
    assert_untouched(student, before)
    assert any(not torch.equal(a, b) for a, b in zip(trained.state_dict().values(), before.values(), strict=True))
    assert not trained.training
    assert_equivalent(trained, fxmerge.fuse(trained), [images(5, 9)], tolerance=1e-4)
    trained.double()
    assert_equivalent(trained, fxmerge.fuse(trained), [images(5, 9).double(), torch.randn(1, 3, 9, 17, dtype=torch.float64)])


def test_distillation_brings_the_student_nearer_to_its_teacher(result: fxmerge.Result) -> None:
    teacher, data = network(), images(64, 11)

    def distance(student: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(divergence(teacher(data), student(data)).mean())

    student = result.student_with_norms()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.2)
    fxmerge.tune.calibrate_norms(student, [(images(64),)])
    pairs = [(images(64, seed), teacher(images(64, seed)).argmax(1)) for seed in range(4)]
    trained = fxmerge.tune.fine_tune(student, lambda: pairs, teacher=teacher, epochs=20, learning_rate=0.002)
    assert distance(trained) < distance(student)


def test_no_epochs_give_a_copy(result: fxmerge.Result) -> None:
    trained = fxmerge.tune.fine_tune(result.student, batches, epochs=0)
    assert trained is not result.student
    assert_untouched(trained, snapshot(result.student))


def test_no_data_is_told(result: fxmerge.Result) -> None:
    with pytest.raises(fxmerge.InputError, match=r"data\(\) gave no batches"):
        fxmerge.tune.fine_tune(result.student, lambda: [], epochs=2)


def test_a_loss_that_diverges_is_told(result: fxmerge.Result) -> None:
    with pytest.raises(fxmerge.InputError, match="lower learning_rate"):
        fxmerge.tune.fine_tune(result.student, batches, epochs=20, learning_rate=1e9)
