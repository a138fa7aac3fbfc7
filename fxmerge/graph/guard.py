"""A check that a graph of fixed sizes carries: it would otherwise compute something else for other sizes, silently."""

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
