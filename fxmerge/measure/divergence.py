"""How far a changed network's output is from the original's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxmerge.core.leaves import leaves, named_leaves
from fxmerge.errors import InputError


def divergence(reference: Any, changed: Any, *, images: int | None = None) -> Tensor:
    """Divergence of one batch's outputs, one value for each image; 0 where they agree.

    A tensor (N, classes) is taken for logits: the Kullback-Leibler divergence of the changed distribution from the original's,
    in nats. Any other floating-point tensor contributes its squared error over its squared size. Several outputs are averaged;
    those that are no floating-point numbers, or of another length than the batch, say nothing of single images and are left out.

    Args:
        reference: what the original returns, any nesting of tensors, dataclasses too.
        changed: what the changed network returns, nested alike.
        images: N; None for the length of the first floating-point output.

    Returns:
        float64, (N,).

    Raises:
        InputError: no output holds floating-point numbers for every image.
    """
    named, others = named_leaves(reference), leaves(changed)
    pairs = [(a, b) for (_, a), b in zip(named, others, strict=True) if _is_floating(a)]
    count = images if images is not None or not pairs else len(pairs[0][0])
    kept = [_of_one(a.double(), b.double()) for a, b in pairs if len(a) == count]
    if not kept:
        found = ", ".join(f"output{path}: {_described(leaf)}" for path, leaf in named) or "nothing"
        raise InputError(
            f"no output holds floating-point numbers for each of the {count or 0} images, so importance cannot be measured. "
            f"Found {found}. Return logits or features, or give Reconstruction(divergence=...)"
        )
    return torch.stack(kept).mean(0)


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0


def _described(leaf: object) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"


def _of_one(reference: Tensor, changed: Tensor) -> Tensor:
    if reference.dim() == 2 and reference.shape[1] > 1:
        log_p, log_q = F.log_softmax(reference, 1), F.log_softmax(changed, 1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1).clamp_min(0.0)
    axes = tuple(range(1, reference.dim()))
    if not axes:
        return (changed - reference) ** 2
    tiny = torch.finfo(torch.float64).tiny
    return ((changed - reference) ** 2).sum(axes) / (reference**2).sum(axes).clamp_min(tiny)
