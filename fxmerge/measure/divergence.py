"""How far a changed network's output is from the original's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


def divergence(reference: Any, changed: Any) -> Tensor:
    """Divergence of one batch's outputs, one value for each image; 0 where they agree.

    A tensor (N, classes) is taken for logits: the Kullback-Leibler divergence of the changed distribution from the original's,
    in nats. Any other floating-point tensor contributes its squared error over its squared size. Several outputs are averaged.

    Args:
        reference: what the original returns, any nesting of tensors.
        changed: what the changed network returns, nested alike.

    Returns:
        float64, (N,).
    """
    pairs = [
        (a, b)
        for a, b in zip(pytree.tree_leaves(reference), pytree.tree_leaves(changed), strict=True)
        if isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 0
    ]
    return torch.stack([_of_one(a.double(), b.double()) for a, b in pairs]).mean(0)


def _of_one(reference: Tensor, changed: Tensor) -> Tensor:
    if reference.dim() == 2 and reference.shape[1] > 1:
        log_p, log_q = F.log_softmax(reference, 1), F.log_softmax(changed, 1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1).clamp_min(0.0)
    axes = tuple(range(1, reference.dim()))
    if not axes:
        return (changed - reference) ** 2
    tiny = torch.finfo(torch.float64).tiny
    return ((changed - reference) ** 2).sum(axes) / (reference**2).sum(axes).clamp_min(tiny)
