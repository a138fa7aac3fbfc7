"""Assertions about merged networks, for the tests of fxmerge and of those who use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import NotEquivalentError

#: Largest relative error allowed, by dtype; what the law of the library asks for.
TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def assert_equivalent(reference: nn.Module, other: nn.Module, inputs: Iterable[Any], *, tolerance: float | None = None) -> float:
    """Assert that two modules compute the same, borders included.

    Args:
        reference: what to compare with. Run in the mode it is in; put both in eval mode where that is meant.
        other: what to compare.
        inputs: for each comparison a tensor, or a tuple of arguments.
        tolerance: largest absolute difference over the reference's largest absolute value; None for the dtype's
            (1e-9 in float64, 1e-4 in float32).

    Returns:
        The largest error found, relative as above.

    Raises:
        NotEquivalentError: shapes or values differ, or something is not finite; says by how much, and where it is largest.

    >>> layer = nn.Conv2d(3, 4, 3)
    >>> assert_equivalent(layer, layer, [torch.zeros(1, 3, 8, 8)])
    0.0
    """
    worst = 0.0
    with torch.no_grad():
        for item in inputs:
            arguments = item if isinstance(item, tuple) else (item,)
            expected, found = (_tensors(module(*_fresh(arguments))) for module in (reference, other))
            if len(expected) != len(found):
                raise NotEquivalentError(f"{len(expected)} outputs and {len(found)}", error=float("inf"), tolerance=0.0)
            for a, b in zip(expected, found, strict=True):
                worst = max(worst, _compare(a, b, tolerance))
    return worst


def assert_untouched(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Assert that a module's state is still what ``snapshot`` said it was.

    Raises:
        NotEquivalentError: a tensor is missing, new, or has other values.
    """
    now = module.state_dict()
    if set(now) != set(before):
        raise NotEquivalentError(f"tensors came or went: {sorted(set(now) ^ set(before))}", error=float("inf"), tolerance=0.0)
    for name, value in before.items():
        if not torch.equal(now[name], value):
            raise NotEquivalentError(f"{name} has changed", error=float("inf"), tolerance=0.0)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state, for :func:`assert_untouched`."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _fresh(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _compare(a: Tensor, b: Tensor, tolerance: float | None) -> float:
    allowed = TOLERANCES.get(a.dtype, 0.0) if tolerance is None else tolerance
    if a.shape != b.shape:
        raise NotEquivalentError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ", error=float("inf"), tolerance=allowed)
    if not a.numel():
        return 0.0
    difference = (a.double() - b.double()).abs()
    scale = float(a.double().abs().max())
    largest = float(difference.max())
    error = largest / scale if scale else largest
    if not error <= allowed:
        place = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise NotEquivalentError(
            f"the largest difference is {error:.3g} of the largest value, at {place} of an output of shape {tuple(a.shape)}; "
            f"{allowed:.3g} is allowed",
            error=error,
            tolerance=allowed,
        )
    return error
