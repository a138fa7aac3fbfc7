"""Short names for networks and data, by which a store knows what a score belongs to."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxmerge.errors import InputError
from fxmerge.graph.portable import message
from fxmerge.graph.query import fingerprint


def network_digest(graph: GraphModule) -> str:
    """Of a graph and its weights."""
    digest = hashlib.sha256(fingerprint(graph).encode())
    for name, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
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

    A lambda, a local function, or an object that cannot be pickled is like no other, in no other run: nothing is kept for it.
    Source is not looked at: a function of a module whose body was changed between two runs is the same to a store, and so is an
    object whose class was; its attributes count.
    """
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '<>')}"
    if not isinstance(function, type) and "<" not in name:
        return name
    try:
        return f"{type(function).__qualname__} {hashlib.sha256(message(function)).hexdigest()[:32]}"
    except InputError:
        return f"{name} {uuid.uuid4()}"


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
