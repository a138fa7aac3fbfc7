"""Calibration data: whatever a user iterates over, checked, as batches of positional arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxmerge.errors import CalibrationError
from fxmerge.graph.meta import facts

#: Positional arguments of the network for one batch.
Batch = tuple[Any, ...]


def as_batches(calibration: Any, graph: GraphModule, *, batch_size: int = 128, limit: int | None = None) -> tuple[Batch, ...]:
    """Batches for a graph from a tensor of images, or an iterable of inputs or of (input, label) pairs; labels are dropped.

    Args:
        calibration: a tensor (N, ...), or an iterable of tensors, batched or single, or of tuples of a network's inputs, with a
            label behind or not (a DataLoader, a torchvision data set).
        graph: the traced network; says how many inputs there are and of which shape.
        batch_size: images a batch.
        limit: how many images to take at most; None for all.

    Raises:
        CalibrationError: not iterable, empty, of the wrong shape, or not finite.
    """
    wanted = [facts(node).shape for node in graph.graph.nodes if node.op == "placeholder" and not node.args]
    if not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration must be a tensor of images or an iterable of inputs, found {type(calibration).__name__}"
        )
    items = [calibration] if isinstance(calibration, Tensor) else calibration
    gathered: list[list[Tensor]] = [[] for _ in wanted]
    count = 0
    for number, item in enumerate(items):
        arguments = _arguments(item, len(wanted), number)
        for store, value, shape in zip(gathered, arguments, wanted, strict=True):
            store.append(_batched(value, shape, number))
        count += len(gathered[0][-1])
        if limit is not None and count >= limit:
            break
    if not count:
        raise CalibrationError("calibration is empty: give at least one image, better a few hundred")
    columns = [_joined(store)[:limit] for store in gathered]
    return tuple(tuple(column[i : i + batch_size] for column in columns) for i in range(0, len(columns[0]), batch_size))


def _joined(store: Sequence[Tensor]) -> Tensor:
    try:
        return torch.cat(list(store))
    except RuntimeError as fault:
        sizes = sorted({tuple(t.shape[1:]) for t in store})
        raise CalibrationError(f"calibration images differ in size: {sizes[:4]}; bring them to one size first") from fault


def _arguments(item: Any, inputs: int, number: int) -> Sequence[Any]:
    values = [item] if isinstance(item, Tensor) else list(item) if isinstance(item, (tuple, list)) else None
    if values is None:
        raise CalibrationError(f"calibration item {number} is a {type(item).__name__}; expected a tensor or a tuple of tensors")
    if len(values) not in (inputs, inputs + 1):
        raise CalibrationError(
            f"calibration item {number} holds {len(values)} values; the network takes {inputs} (a label may follow)"
        )
    return values[:inputs]


def _batched(value: Any, shape: tuple[int, ...] | None, number: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise CalibrationError(f"calibration item {number} holds a {type(value).__name__} where the network takes a tensor")
    if shape is not None:
        if value.dim() == len(shape) - 1:
            value = value.unsqueeze(0)
        if value.dim() != len(shape) or (len(shape) > 1 and value.shape[1] != shape[1]):
            raise CalibrationError(
                f"calibration item {number} has shape {tuple(value.shape)}; the network was traced with {tuple(shape)}"
            )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise CalibrationError(f"calibration item {number} holds NaN or infinity; check the preprocessing")
    batched: Tensor = value
    return batched
