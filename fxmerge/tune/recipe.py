"""A short fine-tuning recipe: the student learns what the original says, and the labels where there are any.

The student trains like any network, with any optimiser and anybody's loop; this is a small one that works. Its loss is Hinton,
Vinyals, Dean (2015): KL divergence between the softened outputs of teacher and student, plus cross entropy on the labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.errors import InputError
from fxmerge.passes.linearize import added_norms


def calibrate_norms(student: GraphModule, batches: Sequence[tuple[Any, ...]]) -> None:
    """Give the identity norms behind fitted convolutions the statistics of what they see, in place; the function stays.

    Args:
        student: from ``linearize(..., norms=True)``; it is changed, its function in eval mode is not.
        batches: calibration inputs, each a tuple of the network's arguments.
    """
    norms = added_norms(student)
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
            for batch in batches:
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


def fine_tune(
    student: GraphModule,
    data: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    *,
    teacher: nn.Module | None = None,
    epochs: int = 1,
    learning_rate: float = 0.01,
    weight_decay: float = 1e-4,
    temperature: float = 4.0,
    steps_per_epoch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GraphModule:
    """Train a student for a few epochs, with the original as teacher.

    Args:
        student: from :func:`fxmerge.linearize`; it is not changed.
        data: called once an epoch; gives batches of (images (N, ...), labels (N,)).
        teacher: gives logits for the same images; None trains on the labels alone.
        epochs: how often to go through the data; 0 gives a copy.
        learning_rate: of SGD with momentum 0.9; falls to 0 along a cosine.
        weight_decay: of SGD.
        temperature: by which logits are divided for the teacher's part of the loss.
        steps_per_epoch: for the schedule; None counts one epoch first.
        progress: called with (done, total) steps.

    Returns:
        A trained copy, in eval mode.

    Raises:
        InputError: the loss is no longer finite; lower the learning rate. Or there is no data.
    """
    trained = copy.deepcopy(student)
    if epochs < 1:
        return trained.eval()
    steps = steps_per_epoch if steps_per_epoch is not None else sum(1 for _ in data())
    total = max(1, steps * epochs)
    optimiser = torch.optim.SGD(trained.parameters(), learning_rate, momentum=0.9, weight_decay=weight_decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    trained.train()
    if teacher is not None:
        teacher = copy.deepcopy(teacher).eval()
    done = 0
    for _ in range(epochs):
        for images, labels in data():
            loss = distillation_loss(trained(images), labels, _logits(teacher, images), temperature)
            if not bool(torch.isfinite(loss)):
                raise InputError(f"the loss is {loss.item()} after {done} steps; lower learning_rate (it is {learning_rate})")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            done += 1
            if done < total:
                schedule.step()
            if progress is not None:
                progress(min(done, total), total)
    if not done:
        raise InputError("data() gave no batches, so nothing was trained; return a new iterable at every call")
    return trained.eval()


def _logits(teacher: nn.Module | None, images: Tensor) -> Tensor | None:
    if teacher is None:
        return None
    with torch.no_grad():
        logits: Tensor = teacher(images)
    return logits


def distillation_loss(logits: Tensor, labels: Tensor, target: Tensor | None, temperature: float) -> Tensor:
    """Cross entropy on labels (N,), and with a teacher's logits (N, classes) nine parts of softened KL to one of it."""
    hard = F.cross_entropy(logits, labels)
    if target is None:
        return hard
    soft = F.kl_div(
        F.log_softmax(logits / temperature, 1), F.log_softmax(target / temperature, 1), log_target=True, reduction="batchmean"
    )
    return 0.9 * temperature**2 * soft + 0.1 * hard
