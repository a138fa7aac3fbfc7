"""What a model is called with while something runs: calibration data from where it will be used."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.core.options import require_whole
from fxmerge.errors import InputError


def recorded_inputs(model: nn.Module, run: Callable[[], Any], *, most: int | None = None) -> tuple[tuple[Any, ...], ...]:
    """The arguments that a model is called with while something runs: calibration data from the trajectory of a sampler.

    Args:
        model: whose calls are recorded; it is left as it was.
        run: called once; for a pipeline, ``lambda: pipeline(batch_size=8, num_inference_steps=50)``.
        most: how many calls to keep, from 1 on, spread evenly over all; None for all.

    Returns:
        For every call a tuple of its arguments that are tensors or numbers, in the order of the model's signature; of dictionaries
        and lists, what is in them. Tensors are copies.

    Raises:
        InputError: the model was not called, or ``most`` is no such number.

    >>> import torch
    >>> layer = nn.Linear(2, 2)
    >>> [x.shape for (x,) in recorded_inputs(layer, lambda: [layer(torch.zeros(n, 2)) for n in (1, 2, 3)], most=2)]
    [torch.Size([1, 2]), torch.Size([3, 2])]
    """
    if most is not None:
        require_whole("most", most, 1)
    signature = inspect.signature(model.forward)
    calls: list[tuple[Any, ...]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(*args, **kwargs)
        every = pytree.tree_leaves((given.args, given.kwargs))  # dictionaries and lists of tensors, too
        values = [v for v in every if isinstance(v, (Tensor, int, float)) and not isinstance(v, bool)]
        calls.append(tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in values))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    if not calls:
        raise InputError(f"the {type(model).__name__} was not called: give a function that runs it")
    if not all(calls):
        raise InputError(f"the {type(model).__name__} was called with no tensor and no number; its arguments must be such")
    count = len(calls) if most is None else min(most, len(calls))
    return tuple(calls[round(i * (len(calls) - 1) / max(1, count - 1))] for i in range(count))
