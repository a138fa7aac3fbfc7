"""After calibration a student's norms do in train mode what they do in eval mode, wherever they came from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.testing import assert_untouched, snapshot
from fxmerge.tune import calibrate_norms
from tests.small import images, network


@pytest.mark.parametrize("norms", [False, True])
def test_train_mode_is_eval_mode_on_the_images_the_norms_have_seen(norms: bool) -> None:
    findings = fxmerge.find_segments(fxmerge.trace(network(), images(4)))
    merge = next(c for p in fxmerge.propose(findings) for c in p.candidates if c.kind == "fitted")
    plan = fxmerge.Plan(findings.fingerprint, (merge,))
    data = images(256)
    weights = fxmerge.fit(findings, plan, data)
    assert len(weights) > 1, "layers that stay were fitted too"
    student = fxmerge.linearize(fxmerge.annotate(findings.graph, plan), weights=weights, norms=norms)
    with torch.no_grad():
        before = student(data)
        calibrate_norms(student, [(data,)])
        after = student(data)
        trained = copy.deepcopy(student).train()
        for module in trained.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        train_mode = trained(data)
    scale = float(before.abs().max())
    assert float((after - before).abs().max()) < 1e-4 * scale
    assert float((train_mode - before).abs().max()) < 0.01 * scale


@pytest.mark.parametrize(
    "given",
    [
        lambda data: data,
        lambda data: [data],
        lambda data: [(data,)],
        lambda data: [(data[:20], torch.zeros(20)), (data[20:], torch.zeros(44))],
        lambda data: [(image, 0) for image in data],
    ],
    ids=["a tensor", "tensors", "tuples of inputs", "batches with labels", "single images with labels"],
)
def test_images_come_in_every_form_that_compress_takes(given: Callable[[Tensor], Any]) -> None:
    data = images(64)
    one, other = fxmerge.trace(network(), images(4)), fxmerge.trace(network(), images(4))
    with torch.no_grad():
        one.get_submodule("1").running_mean += 1.0
        other.get_submodule("1").running_mean += 1.0
    calibrate_norms(one, [(data,)])
    calibrate_norms(other, given(data))
    assert torch.equal(one.get_submodule("1").num_batches_tracked, other.get_submodule("1").num_batches_tracked)
    for mine, its in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(mine.double(), its.double(), rtol=1e-5, atol=1e-6)


def test_images_that_cannot_be_used_leave_the_student_as_it_was() -> None:
    student = fxmerge.trace(network(), images(4))
    before = snapshot(student)
    with pytest.raises(fxmerge.CalibrationError, match="calibration item 1 has shape .8, 1, 12, 12."):
        calibrate_norms(student, [images(8), torch.zeros(8, 1, 12, 12)])
    with pytest.raises(fxmerge.InputError, match="student must be a GraphModule, .*, found Sequential"):
        calibrate_norms(network(), images(4))  # type: ignore[arg-type]
    assert_untouched(student, before)
