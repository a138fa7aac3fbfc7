from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fxmerge.core.table import Target
from fxmerge.measure import contention
from fxmerge.measure.timer import InterleavedTimer, Timed


def times_of(times: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    given: Iterator[tuple[int, int]] = iter(times)
    monkeypatch.setattr(contention, "_ran_and_waited", lambda: next(given))


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    times_of([(1000, 500), (1700, 800)], monkeypatch)
    with contention.contention_told("9 modules were"):
        pass
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "while 9 modules were timed, threads waited 30 % of their time" in record.getMessage()


@pytest.mark.parametrize("after", [(2000, 520), (1000, 500), (900, 900)], ids=["quiet", "not counted", "threads gone"])
def test_nothing_is_told_else(after: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    times_of([(1000, 500), after], monkeypatch)
    with contention.contention_told("9 modules were"):
        pass
    assert not caplog.records


@pytest.mark.skipif(not contention._THREADS.exists(), reason="this system does not count what threads wait")
def test_threads_are_counted() -> None:
    def work() -> None:
        while not done.is_set():
            torch.ones(2**16).sum()

    done = threading.Event()
    worker = threading.Thread(target=work)
    before = contention._ran_and_waited()
    worker.start()
    time.sleep(0.1)
    ran, waited = (after - earlier for after, earlier in zip(contention._ran_and_waited(), before, strict=True))
    done.set()
    worker.join()
    assert ran + waited > 10_000_000


def test_what_cannot_be_read_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("1", "70 30 2"), ("2", "7 3 1\n"), ("3", "not counted")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text, encoding="ascii")
    monkeypatch.setattr(contention, "_THREADS", tmp_path)
    assert contention._ran_and_waited() == (77, 33)
    monkeypatch.setattr(contention, "_THREADS", tmp_path / "none")
    assert contention._ran_and_waited() == (0, 0)


def test_the_timer_tells(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    times_of([(0, 0), (10, 90)], monkeypatch)
    timer = InterleavedTimer(rounds=1, warmup=1, max_runs_per_sample=1)
    timer([Timed(nn.Conv2d(2, 3, 3), ((1, 2, 8, 8),))], target=Target())
    assert "while 1 module was timed, threads waited 90 %" in caplog.text
