"""A student's batch norms: given the statistics of what they see, before the student is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.measure.calibration import accepted, as_batches
from fxmerge.tune.features import require_graph


def calibrate_norms(student: GraphModule, batches: Any) -> None:
    """Give all batch norms the statistics of what they see in the student, in place; the function in eval mode stays.

    Those behind fitted convolutions, and behind layers that were fitted again, have none so far; behind a merge, those of the
    original no longer hold. In train mode a norm computes what it does in eval mode only where its statistics are its data's.

    Args:
        student: from ``linearize``; it is changed, its function in eval mode is not.
        batches: what ``compress`` takes as calibration: a tensor (N, ...), or an iterable of inputs or (input, label) pairs.

    Raises:
        InputError: a model where a student belongs.
        CalibrationError: the images cannot be used; the student is as it was.
    """
    require_graph("student", student)
    data = as_batches(batches, student)
    norms = {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and module.track_running_stats
    }
    seen: dict[str, list[Tensor]] = {name: [] for name in norms}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double().transpose(0, 1).flatten(1)
            seen[name].append(torch.stack((x.sum(1), (x * x).sum(1), torch.full_like(x[:, 0], x.shape[1]))))

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in norms.items()]
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            for batch in data:
                with accepted(batch):
                    student(*batch)
    finally:
        for handle in handles:
            handle.remove()
        student.train(was_training)
    for name, norm in norms.items():
        if seen[name]:
            _take(norm, torch.stack(seen[name]).sum(0))


def _take(norm: Any, sums: Tensor) -> None:
    """Set running statistics, and the affine part so that eval mode computes what it did."""
    mean = sums[0] / sums[2]
    variance = (sums[1] / sums[2] - mean**2).clamp_min(1e-6)
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    with torch.no_grad():
        norm.weight.copy_(scale * torch.sqrt(variance + norm.eps))
        norm.bias.copy_(shift + mean * scale)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
