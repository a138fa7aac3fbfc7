"""What is kept comes back as it was, from memory or from a file, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx

from fxmerge import InputError
from fxmerge.measure.shelf import Shelf, Values


@pytest.mark.parametrize("limit", [0, 20, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_come_back_as_they_were(limit: int, dtype: torch.dtype) -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(4)]
    tensors = [(torch.randn(3, 2, i + 1) * 9).to(dtype).transpose(0, 1) for i in range(3)]
    with Shelf(limit) as shelf:
        values = Values(shelf)
        for node, tensor in zip(nodes, [*tensors, "no tensor"], strict=True):
            values[node] = tensor
        assert [torch.equal(values[node], tensor) for node, tensor in zip(nodes, tensors, strict=False)] == [True] * 3
        assert values[nodes[3]] == "no tensor"
        assert (shelf.folder is None) == (limit > 1000)
        for node in nodes:
            values.drop(node)
        assert shelf.held == 0
        folder = shelf.folder and Path(shelf.folder.name)
        assert folder is None or not list(folder.iterdir())
    assert folder is None or not folder.exists()


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("fxmerge.measure.shelf.mapped", full)
    with Shelf(0) as shelf, pytest.raises(InputError, match="do not fit into the temporary folder .*fewer calibration images"):
        shelf.keep(torch.zeros(4))
