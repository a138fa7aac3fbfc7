"""Checks that a graph of certain sizes carries: it would otherwise compute something else for other sizes, silently."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxmerge.errors import InputError


def require_size(tensor: Tensor, sizes: Sequence[int | None]) -> None:
    """Raise InputError unless the tensor has these sizes; None is any.

    >>> import torch
    >>> require_size(torch.zeros(4, 3, 8, 8), (None, 3, 8, 8))
    """
    found = tuple(tensor.shape)
    if len(sizes) != len(found) or any(size not in (None, there) for size, there in zip(sizes, found, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise InputError(
            f"this graph was captured for inputs of size ({wanted}) and found {found}: the model's code computes with "
            "sizes in a way that only fixed ones can be captured; trace the model again with inputs of this size"
        )


def require_step(tensor: Tensor, sizes: Sequence[int], step: int) -> None:
    """Raise InputError unless the last sizes of the tensor differ from these by multiples of a step.

    >>> import torch
    >>> require_step(torch.zeros(4, 3, 12, 6), (8, 8), 2)
    """
    found = tuple(tensor.shape[-len(sizes) :])
    if any((there - size) % step for size, there in zip(sizes, found, strict=True)):
        raise InputError(
            f"this graph was captured for images of {'x'.join(map(str, sizes))} pixels, and larger or smaller ones by multiples of "
            f"{step}; found {'x'.join(map(str, found))}, for which the model computes in another way: trace it with such images"
        )
