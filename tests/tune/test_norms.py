"""After calibration a student's norms do in train mode what they do in eval mode, wherever they came from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxmerge
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


def test_images_that_are_in_no_tuple_are_told() -> None:
    with pytest.raises(
        fxmerge.InputError, match=r"each batch must be a tuple of the network's arguments, such as \(images,\); found Tensor"
    ):
        calibrate_norms(fxmerge.trace(network(), images(4)), images(4))  # type: ignore[arg-type]
