"""Random numbers that can be written down: what training draws is its own, and goes on where a checkpoint left it.

The data draws from one stream and the network (dropout) from another. The data's starts anew every epoch, from the seed and the
number of the epoch; so after a resumption the batches that were seen already are gone through again, and the next is the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy
import torch

T = TypeVar("T")


def random_state(device: torch.device) -> dict[str, Any]:
    """The global generators of torch (on the CPU and on a device), Python and NumPy; a value that ``json`` can write."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "device": "" if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device).numpy().tobytes().hex(),
        "python": random.getstate(),
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the global generators where :func:`random_state` found them."""
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type != "cpu" and state["device"]:
        torch.get_device_module(device).set_rng_state(_bytes(state["device"]), device)
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(words, dtype=numpy.uint32), *rest))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def seed_all(seed: int) -> None:
    """Seed the global generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


@contextmanager
def random_numbers_put_back(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they were found."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


def drawn_apart(items: Iterable[T], seed: int) -> Iterator[T]:
    """The items of an iterable that draws from generators of its own, seeded; the global ones stay as they are in between.

    Generators of devices are not set apart: data is made on the CPU.
    """
    outside = _here()
    seed_all(seed)
    iterator = iter(items)
    inside = _here()
    _put(outside)
    while True:
        outside = _here()
        _put(inside)
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            inside = _here()
            _put(outside)
        yield item


def _here() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()


def _put(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy.random.set_state(states[2])
