"""Tensors on their way into a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def apart(tensor: Tensor) -> Tensor:
    """A copy in main memory of its own: safetensors takes no views."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def checksum(about: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a file holds: a text, and contiguous tensors in main memory."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
