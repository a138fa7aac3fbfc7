from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fxmerge.core.table import Target
from fxmerge.measure import paging
from fxmerge.measure.timer import InterleavedTimer, Timed


def faults_of(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    given: Iterator[int] = iter(counts)
    monkeypatch.setattr(paging, "_faults", lambda: next(given))


def test_much_fresh_memory_is_told_with_what_helps(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    faults_of([1000, 1000 + 2560], monkeypatch)
    monkeypatch.setattr(paging, "_page_size", lambda: 4096)
    assert paging.watched(lambda: 10_000_000, "the network") == 10_000_000
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "the network gets 10 MB" in record.getMessage()
    assert "at least 13 %" in record.getMessage()
    assert paging.KEPT in record.getMessage()


def test_little_is_not_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    faults_of([1000, 1000 + 2560], monkeypatch)
    assert paging.watched(lambda: 100_000_000, "the network") == 100_000_000
    assert not caplog.records


@pytest.mark.skipif(paging.resource is None, reason="this system does not count page faults")
def test_fresh_pages_are_counted() -> None:
    before = paging._faults()
    held = [torch.empty(2**20, dtype=torch.uint8).fill_(1) for _ in range(64)]
    assert paging._faults() - before > 0
    del held


def test_the_timer_watches_whole_networks_only(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(paging, "_TOLERATED", -1.0)
    timer = InterleavedTimer(rounds=1, warmup=1, max_runs_per_sample=1)
    parts = [Timed(nn.Conv2d(2, 3, 3), ((1, 2, 8, 8),)), Timed(nn.Sequential(nn.ReLU()), ((1, 2, 8, 8),), thorough=True)]
    timer(parts, target=Target())
    assert [record.getMessage().partition(" gets")[0] for record in caplog.records] == ["Sequential"]
