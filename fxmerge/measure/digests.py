"""Short names for networks and data, by which a store knows what a score belongs to."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxmerge.errors import InputError
from fxmerge.graph.portable import message
from fxmerge.graph.query import fingerprint


def network_digest(network: nn.Module) -> str:
    """Of the weights and buffers of a network, and of what it is: its graph if it is one, else its class."""
    what = fingerprint(network) if isinstance(network, GraphModule) else type(network).__qualname__
    digest = hashlib.sha256(what.encode())
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(name.encode())
        _add(digest, tensor)
    return digest.hexdigest()[:32]


def data_digest(batches: Iterable[Any]) -> str:
    """Of inputs (and labels), and how they are batched."""
    digest = hashlib.sha256()
    for value in pytree.tree_leaves(list(batches)):
        if isinstance(value, Tensor):
            _add(digest, value)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:32]


def function_name(function: Any) -> str:
    """What tells a function apart from others in a store: its name where it has one, else all that pickle knows of it.

    A method of an object is what the object is: all its attributes count. A lambda, a local function, or an object that cannot be
    pickled is like no other, in no other run: nothing is kept for it. Source is not looked at: a function of a module whose body
    was changed between two runs is the same to a store, and so is an object whose class was; its attributes count.
    """
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '<>')}"
    owner = getattr(function, "__self__", None)
    bound = owner is not None and not isinstance(owner, (type, ModuleType))
    if not isinstance(function, type) and "<" not in name and not bound:
        return name
    try:
        return f"{type(function).__qualname__} {hashlib.sha256(message(function)).hexdigest()[:32]}"
    except InputError:
        return f"{name} {uuid.uuid4()}"


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
