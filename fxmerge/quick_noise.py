"""Random initialisation in a fraction of the time, for networks whose structure alone is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: How many numbers are drawn for a tensor of more. A prime, so that no two filters are alike for their size divides it.
DRAWN = 65_537

_NOISE = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)


class QuickNoise(TorchDispatchMode):
    """Large tensors are filled with normal or uniform noise by repeating the first of it.

    >>> import torch
    >>> with QuickNoise():
    ...     layer = torch.nn.Linear(1000, 1000)
    >>> weights = layer.weight.detach().flatten()
    >>> torch.equal(weights[:DRAWN], weights[DRAWN : 2 * DRAWN]), round(float(weights.std() * 1000**0.5), 1)
    (True, 0.6)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func not in _NOISE or args[0].numel() <= DRAWN or not args[0].is_contiguous():
            return func(*args, **given)
        flat = args[0].view(-1)
        func(flat[:DRAWN], *args[1:], **given)
        whole = len(flat) // DRAWN * DRAWN
        flat[DRAWN:whole].view(-1, DRAWN).copy_(flat[:DRAWN].expand(whole // DRAWN - 1, DRAWN))
        flat[whole:].copy_(flat[: len(flat) - whole])
        return args[0]
