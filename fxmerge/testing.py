"""Assertions about merged networks, for the tests of fxmerge and of those who use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.core.leaves import leaves
from fxmerge.errors import InputError, NotEquivalentError

#: Largest relative error allowed, by dtype; what the law of the library asks for.
TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def assert_equivalent(reference: nn.Module, other: nn.Module, inputs: Iterable[Any], *, tolerance: float | None = None) -> float:
    """Assert that two modules compute the same, borders included.

    Args:
        reference: what to compare with. Run in the mode it is in; put both in eval mode where that is meant.
        other: what to compare.
        inputs: for each comparison a tensor, or a tuple of arguments. At least one; a tensor alone is one comparison.
        tolerance: largest absolute difference over the reference's largest finite absolute value; None for the dtype's
            (1e-9 in float64, 1e-4 in float32). Equal infinities do not differ, NaN always does; what is no tensor must be equal.

    Returns:
        The largest error found, relative as above.

    Raises:
        NotEquivalentError: outputs differ in number, shape or value; says by how much, and where most.
        InputError: there is nothing to compare: no inputs, or no outputs.

    >>> layer = nn.Conv2d(3, 4, 3)
    >>> assert_equivalent(layer, layer, [torch.zeros(1, 3, 8, 8)])
    0.0
    """
    errors = []
    with torch.no_grad():
        for item in [inputs] if isinstance(inputs, Tensor) else inputs:
            arguments = tuple(item) if isinstance(item, (tuple, list)) else (item,)
            expected, found = (leaves(module(*_fresh(arguments))) for module in (reference, other))
            if len(expected) != len(found):
                raise NotEquivalentError(f"{len(expected)} outputs and {len(found)}", error=float("inf"), tolerance=0.0)
            errors += [_compare(a, b, tolerance) for a, b in zip(expected, found, strict=True)]
    if not errors:
        raise InputError("nothing was compared: give at least one input (a generator serves once), to modules that give something")
    return max(errors)


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


def _fresh(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    copies: tuple[Any, ...] = pytree.tree_map_only(Tensor, Tensor.clone, arguments)
    return copies


def _compare(a: Any, b: Any, tolerance: float | None) -> float:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        if type(a) is not type(b) or a != b:
            raise NotEquivalentError(f"outputs {a!r:.80} and {b!r:.80} differ", error=float("inf"), tolerance=0.0)
        return 0.0
    allowed = TOLERANCES.get(a.dtype.to_real(), 0.0) if tolerance is None else tolerance
    if a.shape != b.shape:
        raise NotEquivalentError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ", error=float("inf"), tolerance=allowed)
    if not a.numel():
        return 0.0
    difference, scale = _difference(a, b)
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


def _difference(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """Absolute differences, 0 where the values are equal (infinities too), and the largest finite absolute value of the first."""
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.cpu(), b.cpu()
    difference = (a.to(wide) - b.to(wide)).abs().masked_fill(a == b, 0.0)
    sizes = a.to(wide).abs()
    return difference, float(sizes.masked_fill(~sizes.isfinite(), 0.0).max())
