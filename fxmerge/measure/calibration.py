"""Calibration data: whatever a user iterates over, checked, as batches of positional arguments.

The example inputs that a graph was traced with say what its arguments are: which were given at all, and which hold one entry for
every image, as those do that have as many as the images (the argument of most dimensions). All others are one value for all images
of an item: a tensor (a time step) may differ from item to item, which then share no batch; what is no tensor is constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxmerge.errors import CalibrationError, FxMergeError
from fxmerge.graph.meta import Facts, facts

#: Positional arguments of the network for one batch.
Batch = tuple[Any, ...]


def as_batches(
    calibration: Any, graph: GraphModule, *, batch_size: int = 128, limit: int | None = None, seed: int | None = 0
) -> tuple[Batch, ...]:
    """Batches for a graph from a tensor of images, or an iterable of inputs or of (input, label) pairs; labels are dropped.

    Images come in an order drawn by chance, always the same: scorers and fits take some of them for this, some for that, and data
    often lies by classes, or by time steps.

    Args:
        calibration: a tensor (N, ...), or an iterable of tensors, batched or single, or of tuples of a network's inputs, with a
            label behind or not (a DataLoader, a torchvision data set).
        graph: the traced network; says how many inputs there are, of which shape and dtype. An argument with a default that the
            example inputs left out is left out here too.
        batch_size: images a batch.
        limit: how many images to take at most, from the first that are given; None for all.
        seed: of the order; None for the order that they are given in.

    Raises:
        CalibrationError: not iterable, empty, of the wrong shape, dtype, device or layout, or not finite.
    """
    if not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration must be a tensor of images or an iterable of inputs, found {type(calibration).__name__}"
        )
    table = _Columns(graph)
    for number, item in enumerate([calibration] if isinstance(calibration, Tensor) else calibration):
        table.add(item, number)
        if limit is not None and table.count >= limit:
            break
    if not table.count:
        raise CalibrationError("calibration is empty: give at least one image, better a few hundred")
    return table.batches(batch_size, table.count if limit is None else min(limit, table.count), seed)


def arguments_of(graph: GraphModule) -> tuple[str, ...]:
    """Names of the arguments that a batch for this graph gives."""
    return tuple(str(node.target) for node in _Columns(graph).given)


def images_in(batch: Batch) -> int:
    """How many images a batch holds: the length of the argument of most dimensions."""
    return len(max((value for value in batch if isinstance(value, Tensor)), key=Tensor.dim))


def in_parts(batches: Sequence[Batch], graph: GraphModule, images: int, *, limit: int | None = None) -> tuple[Batch, ...]:
    """The same batches, cut so that none holds more images than this; arguments that are one for all images stay whole.

    Args:
        batches: from :func:`as_batches`.
        graph: that they are for.
        images: a batch, at most.
        limit: how many images to take, from the first; None for all.
    """
    columns = _Columns(graph)
    batched = [node in columns.batched for node in columns.holders]
    left = math.inf if limit is None else limit
    parts = []
    for batch in batches:
        count = int(min(images_in(batch), left))
        for start in range(0, count, images):
            stop = min(start + images, count)
            parts.append(tuple(value[start:stop] if many else value for value, many in zip(batch, batched, strict=True)))
        left -= count
    return tuple(parts)


@contextmanager
def accepted(batch: Batch) -> Iterator[None]:
    """What a network raises on calibration inputs becomes a CalibrationError that says of which size they are."""
    try:
        yield
    except (FxMergeError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as fault:
        sizes = ", ".join(str(tuple(value.shape)) for value in batch if isinstance(value, Tensor))
        text = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise CalibrationError(
            f"the network rejects calibration inputs of size {sizes}: {text}. Give images of the size it was traced with"
        ) from fault


def picked(batch: Batch, graph: GraphModule, index: Tensor) -> Batch:
    """The images of these numbers (K,) of a batch; arguments that are one for all images stay whole."""
    columns = _Columns(graph)
    return tuple(
        value[index.to(value.device)] if node in columns.batched else value
        for node, value in zip(columns.holders, batch, strict=True)
    )


def last_images(batches: Sequence[Batch], graph: GraphModule, images: int) -> tuple[Batch, ...]:
    """So many of the images, from the last; arguments that are one for all images stay whole."""
    left, parts = images, []
    for batch in reversed(batches):
        count = images_in(batch)
        if left >= count:
            parts.append(batch)
        elif left > 0:
            parts.append(picked(batch, graph, torch.arange(count - left, count)))
        left -= count
    return tuple(reversed(parts))


def shared_out(shares: Tensor | None, value: Tensor, rows: int) -> Tensor | None:
    """How much each of the rows that a tensor becomes counts; all alike where its first dimension is not that of the images."""
    if shares is None or not value.dim() or len(value) != len(shares):
        return None
    return shares.repeat_interleave(rows // len(shares))


class _Columns:
    """What was gathered so far, one column for every argument that the network is given."""

    def __init__(self, graph: GraphModule) -> None:
        self.holders: list[Node] = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.given = [node for node in self.holders if facts(node).shape is not None or not node.args]
        shapes = {node: shape for node in self.given if (shape := facts(node).shape)}
        if not shapes:
            raise CalibrationError("the network takes no tensor, so there is nothing to calibrate with; exact=True needs no data")
        self.images = max(shapes, key=lambda node: len(shapes[node]))
        self.batched = [node for node, shape in shapes.items() if shape[0] == shapes[self.images][0]]
        self.devices = {parameter.device for parameter in graph.parameters()}
        self.columns: dict[Node, list[Any]] = {node: [] for node in self.given}
        self.lengths: list[int] = []

    @property
    def count(self) -> int:
        """Images so far."""
        return sum(self.lengths)

    def add(self, item: Any, number: int) -> None:
        """Check one item and put each of its values into its column."""
        values = dict(zip(self.given, _arguments(item, [str(node.target) for node in self.given], number), strict=True))
        ready = {node: self._ready(node, value, f"calibration item {number}") for node, value in values.items()}
        images = len(ready[self.images])
        for node in self.batched:
            if ready[node].dim() == 1 == len(ready[node]):  # one number for all images of this item
                ready[node] = ready[node].expand(images)
        lengths = {node.name: len(ready[node]) for node in self.batched}
        if len(set(lengths.values())) > 1:
            raise CalibrationError(
                f"calibration item {number} holds unequal numbers of entries ({lengths}): give one of each for every image, or, "
                "where an argument is one for all images, trace with another number of images"
            )
        for node, value in ready.items():
            self.columns[node].append(value)
        self.lengths.append(images)

    def _ready(self, node: Node, value: Any, where: str) -> Any:
        known = facts(node)
        if known.shape is None:
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and len(known.shape) < 2:
            value = torch.tensor(value, dtype=known.dtype, device=next(iter(self.devices), None))
        checked = _checked(value, known, self.devices, where)
        if node in self.batched:
            return _batched(checked, known.shape, where)
        return checked

    def batches(self, size: int, count: int, seed: int | None) -> tuple[Batch, ...]:
        """So many of what was gathered, a few images at a time, in an order drawn by this seed, if there is one."""
        batches: list[Batch] = []
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        runs = list(self._alike())
        for first, last in runs:
            columns = {n: _joined(c[first:last]) if n in self.batched else c[first] for n, c in self.columns.items()}
            there = min(sum(self.lengths[first:last]), count)
            count -= there
            if generator is not None:
                order = torch.randperm(there, generator=generator)
                columns = {n: value[order.to(value.device)] if n in self.batched else value for n, value in columns.items()}
            for start in range(0, there, size):
                part = slice(start, min(start + size, there))
                values = {n: value[part] if n in self.batched else value for n, value in columns.items()}
                batches.append(tuple(values[node] if node in values else node.args[0] for node in self.holders))
        if generator is not None and len(runs) > 1:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return tuple(batches)

    def _alike(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of every run of items that give the same to all arguments which are one for all images."""
        single = [node for node in self.given if node not in self.batched]
        for node in single:
            if facts(node).shape is None:
                _require_same(self.columns[node], node)
        count = len(self.lengths)
        starts = [n for n in range(1, count) if not all(_same(self.columns[node][n - 1], self.columns[node][n]) for node in single)]
        yield from itertools.pairwise([0, *starts, count])


def _arguments(item: Any, names: Sequence[str], number: int) -> Sequence[Any]:
    values = [item] if isinstance(item, Tensor) else list(item) if isinstance(item, (tuple, list)) else None
    if values is None:
        raise CalibrationError(f"calibration item {number} is a {type(item).__name__}; expected a tensor or a tuple of tensors")
    if len(values) not in (len(names), len(names) + 1):
        takes = f"the network takes {len(names)}: {', '.join(names)} (a label may follow)"
        raise CalibrationError(f"calibration item {number} holds {len(values)} values; {takes}")
    return values[: len(names)]


def _checked(value: Any, known: Facts, devices: set[torch.device], where: str) -> Tensor:
    """A tensor that the network can take, but for its size."""
    if not isinstance(value, Tensor):
        raise CalibrationError(f"{where} holds a {type(value).__name__} where the network takes a tensor")
    if value.layout is not torch.strided or value.is_meta:
        kind = "on the meta device, without values" if value.is_meta else f"of layout {value.layout}"
        raise CalibrationError(f"{where} is {kind}: give ordinary tensors")
    if devices and value.device not in devices:
        raise CalibrationError(f"{where} is on {value.device}, the network on {', '.join(map(str, devices))}: move one of them")
    if value.dtype != known.dtype:
        raise CalibrationError(f"{where} is {value.dtype}; the network was traced with {known.dtype}: convert it with .to()")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise CalibrationError(f"{where} holds NaN or infinity; check the preprocessing")
    return value.detach()  # what made it is not trained along with the network


def _batched(value: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    if value.dim() == len(shape) - 1:
        value = value.unsqueeze(0)
    if value.dim() != len(shape) or (len(shape) > 1 and value.shape[1] != shape[1]) or 0 in value.shape[1:]:
        raise CalibrationError(f"{where} has shape {tuple(value.shape)}; the network was traced with {tuple(shape)}")
    return value


def _joined(store: Sequence[Tensor]) -> Tensor:
    try:
        return torch.cat(list(store))
    except RuntimeError as fault:
        sizes = sorted({tuple(t.shape[1:]) for t in store})
        raise CalibrationError(f"calibration images differ in size: {sizes[:4]}; bring them to one size first") from fault


def _require_same(store: Sequence[Any], node: Node) -> None:
    """All items must give the same to an argument that is no tensor."""
    for number, value in enumerate(store):
        if not _same(store[0], value):
            raise CalibrationError(
                f"calibration item {number} gives {node.target} another value than item 0: it is one for all, for what is no "
                "tensor is a constant of the graph. Where it should vary, trace with a tensor: one entry for every image"
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other) if not isinstance(one, Tensor) and not isinstance(other, Tensor) else False
