"""Tensors that are kept for later, in memory up to a limit, beyond it in files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch import from_file as mapped
from torch.fx import Node

from fxmerge.errors import InputError


class Shelf:
    """Keeps tensors; those beyond the limit lie in a temporary folder, mapped into memory, until nobody holds them.

    Args:
        memory_bytes: limit of what is held in memory.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.held = 0
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.files = 0

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        if self.folder is not None:
            self.folder.cleanup()

    def keep(self, value: Tensor) -> _Kept:
        """Take a tensor."""
        if self.held + value.nbytes <= self.memory_bytes or not value.numel():
            self.held += value.nbytes
            return _Kept(self, value, None)
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="fxmerge-", ignore_cleanup_errors=True)
        self.files += 1
        path = Path(self.folder.name) / str(self.files)
        try:
            copy = mapped(str(path), shared=True, size=value.numel(), dtype=value.dtype)
            copy.copy_(value.detach().reshape(-1))
        except (OSError, RuntimeError) as fault:
            where = f"the temporary folder {self.folder.name}"
            raise InputError(
                f"{value.nbytes:,} bytes do not fit into {where} ({fault}): give fewer calibration images, or more memory_bytes"
            ) from fault
        return _Kept(self, copy.view(value.shape), path, device=str(value.device))


class _Kept:
    """One tensor on a shelf."""

    def __init__(self, shelf: Shelf, value: Tensor, path: Path | None, *, device: str = "") -> None:
        self.shelf, self.value, self.path, self.device = shelf, value, path, device

    def get(self) -> Tensor:
        return self.value.to(self.device) if self.device else self.value

    def drop(self) -> None:
        if self.path is None:
            self.shelf.held -= self.value.nbytes
        else:
            with contextlib.suppress(OSError):  # where an open file cannot be removed, the folder's end removes it
                self.path.unlink()


class Values:
    """The values of a graph's nodes for one batch, those that are tensors on a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.kept: dict[Node, Any] = {}

    def __setitem__(self, node: Node, value: Any) -> None:
        self.kept[node] = self.shelf.keep(value) if isinstance(value, Tensor) else value

    def __getitem__(self, node: Node) -> Any:
        found = self.kept[node]
        return found.get() if isinstance(found, _Kept) else found

    def __contains__(self, node: object) -> bool:
        return node in self.kept

    def __iter__(self) -> Iterator[Node]:
        return iter(self.kept)

    def drop(self, node: Node) -> None:
        """Forget a value, if it is there."""
        found = self.kept.pop(node, None)
        if isinstance(found, _Kept):
            found.drop()
