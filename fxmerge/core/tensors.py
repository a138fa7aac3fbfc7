"""Tensors on their way into a file."""

from __future__ import annotations

import torch
from torch import Tensor


def apart(tensor: Tensor) -> Tensor:
    """A copy in main memory of its own: safetensors takes no views."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
