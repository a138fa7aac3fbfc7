"""Labelled batches as users give them: what is no data is told, and what does not fit is told in a few words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from torch import Tensor

from fxmerge.errors import InputError

#: (inputs, labels); inputs is a tensor, or the tuple of the network's arguments.
Labelled: TypeAlias = tuple[Any, Any]


def labelled(name: str, given: Any) -> tuple[Labelled, ...]:
    """Batches, looked at as far as that can be done without the network."""
    if not isinstance(given, Iterable):
        raise InputError(f"{name} must hold (inputs, labels) pairs, found {type(given).__name__}")
    batches = tuple(given)
    for number, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InputError(f"{name} must hold (inputs, labels) pairs; batch {number} is {type(batch).__name__} {shapes(batch)}")
        tensors = [value for value in arguments(batch[0]) if isinstance(value, Tensor)]
        if not any(value.dim() and len(value) for value in tensors):
            raise InputError(f"batch {number} of {name} holds no images: its inputs are {shapes(batch[0])}. Leave it out.")
    return batches


def check_labels(labels: Any, outputs: Any) -> None:
    """A label of a class that the network does not know would count as wrong, without a word."""
    classes = outputs.shape[1]
    if labels.is_floating_point() or labels.shape != outputs.argmax(1).shape:
        raise ValueError(f"labels are {shapes(labels)}; outputs of {shapes(outputs)} want numbers of classes of one dimension less")
    wrong = labels[(labels >= classes) | ((labels < 0) & (labels != _IGNORED))]
    if wrong.numel():
        raise ValueError(f"a label is {wrong[0].item()}; the network knows classes 0 to {classes - 1}")


_IGNORED = -100  # torch's own label for what does not count


def shapes(value: Any) -> str:
    """What was given, in a few words."""
    if isinstance(value, Tensor):
        return f"{'x'.join(map(str, value.shape)) or 'a single number'} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shapes, value))})"
    return f"{value!r:.40}"


def short(fault: Exception) -> str:
    """An error, in a line."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"


def arguments(inputs: Any) -> tuple[Any, ...]:
    """The arguments that the network is called with."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
