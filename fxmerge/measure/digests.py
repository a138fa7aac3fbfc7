"""Short names for networks and data, by which a store knows what a score belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

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


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
