"""Batches for training: this process's share, on its device, the same every time an epoch is gone through."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from fxmerge.errors import InputError
from fxmerge.measure.labelled import shapes
from fxmerge.tune.randomness import drawn_apart

#: A DataLoader; or batches that can be gone through again and again; or what gives the batches of an epoch, by its number from 0.
Data: TypeAlias = "DataLoader[Any] | Iterable[Any] | Callable[[int], Iterable[Any]]"
Example: TypeAlias = "tuple[tuple[Any, ...], Any]"


class Feed:
    """Labelled batches, shared out between the processes of an accelerator.

    A DataLoader is shared out by accelerate; of other data, process k of n takes batches k, n + k, ... and what does not go round
    is left out in training.

    Args:
        data: gives (inputs, labels) pairs; inputs is a tensor or the tuple of a network's arguments, labels may be None.
        accelerator: of accelerate.
        seed: of whatever the data draws from global generators.
    """

    def __init__(self, data: Data, accelerator: Any, seed: int) -> None:
        self.accelerator, self.seed = accelerator, seed
        self.prepared = isinstance(data, DataLoader)
        self.data: Any = _prepared(data, accelerator, seed) if self.prepared else data
        if not callable(self.data) and not isinstance(self.data, Iterable):
            raise InputError(f"data must give batches, or be a function that does; found {type(data).__name__}")
        if isinstance(self.data, Iterator):
            raise InputError("data can be gone through once only; give a list, a DataLoader, or a function (epoch) -> batches")

    def steps(self) -> int:
        """Batches an epoch for each process; where the data does not say, one epoch is counted."""
        try:
            count = len(self.data)
        except TypeError:  # loaders have a length that their data may not have
            count = sum(1 for _ in drawn_apart(self._batches(0), self.seed))
        return count if self.prepared else count // int(self.accelerator.num_processes)

    def epoch(self, number: int, *, skip: int = 0) -> Iterator[Example]:
        """The batches of an epoch, the first few left out (but drawn, so that the others are what they would have been)."""
        seed = self.seed + 1_000_003 * (number + 1)
        if self.prepared:
            self._start(number)
            share = drawn_apart(self._batches(number), seed + int(self.accelerator.process_index))
        else:
            share = self._share(drawn_apart(self._batches(number), seed))
        for index, batch in enumerate(itertools.islice(share, skip, None), skip):
            yield self._example(batch, f"batch {index} of epoch {number + 1}")

    def whole(self) -> Iterator[Example]:
        """The batches that a network is judged on; where processes share them, none is left out."""
        if self.prepared:
            self._start(0)
            batches: Iterable[Any] = self._batches(0)
        else:
            here, count = int(self.accelerator.process_index), int(self.accelerator.num_processes)
            batches = itertools.islice(self._batches(0), here, None, count)
        for index, batch in enumerate(drawn_apart(batches, self.seed)):
            yield self._example(batch, f"batch {index}")

    def _start(self, number: int) -> None:
        self.data.set_epoch(number)
        for generator in (getattr(self.data, "generator", None), getattr(getattr(self.data, "sampler", None), "generator", None)):
            if isinstance(generator, torch.Generator):
                generator.manual_seed(self.seed + number)

    def _batches(self, number: int) -> Iterable[Any]:
        batches: Iterable[Any] = self.data(number) if callable(self.data) else self.data
        if not isinstance(batches, Iterable):
            raise InputError(f"data, a function of the number of an epoch, must give batches; gave {type(batches).__name__}")
        return batches

    def _share(self, batches: Iterator[Any]) -> Iterator[Any]:
        here, count = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        while len(turn := list(itertools.islice(batches, count))) == count:
            yield turn[here]

    def _example(self, batch: Any, where: str) -> Example:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InputError(
                f"data must give (inputs, labels) pairs, labels None where there are none; {where} is a {type(batch).__name__}, "
                f"{shapes(batch)}"
            )
        from accelerate.utils import send_to_device

        inputs, labels = batch
        arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        # What made them is not trained along.
        apart = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (arguments, labels))
        sent: Example = send_to_device(apart, self.accelerator.device)
        return sent


def _prepared(data: Data, accelerator: Any, seed: int) -> Any:
    """The loader shared out, its order (where it is shuffled) told by the seed and the number of the epoch alone."""
    options = accelerator.dataloader_config
    before = options.use_seedable_sampler, options.data_seed
    options.use_seedable_sampler, options.data_seed = True, seed
    try:
        return accelerator.prepare_data_loader(_own(data, {}))
    finally:
        options.use_seedable_sampler, options.data_seed = before


#: What a loader, and a sampler, hold that accelerate or a new epoch writes into.
_WRITTEN = ("generator", "sampler", "batch_sampler")


def _own(thing: Any, made: dict[int, Any]) -> Any:
    """A loader or sampler of the same data and order, whose samplers and generators are its own, each copied once.

    Args:
        thing: not changed.
        made: what was copied so far, by the id of what it is a copy of.
    """
    if id(thing) not in made:
        if isinstance(thing, torch.Generator):
            own: Any = torch.Generator(thing.device)
            own.set_state(thing.get_state())
        else:
            own = copy.copy(thing)
            held = getattr(own, "__dict__", {})  # a loader lets nobody set its attributes in another way
            held.update({name: _own(held[name], made) for name in _WRITTEN if held.get(name) is not None})
            if "_iterator" in held:  # the workers of the other
                held["_iterator"] = None
        made[id(thing)] = own
    return made[id(thing)]
