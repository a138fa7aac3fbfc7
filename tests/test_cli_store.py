"""The verbs around a store: measure fills it, solve and front read it without the model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import fxmerge
from fxmerge.budget import budget_ns
from fxmerge.cli import main
from fxmerge.core.table import Measurement
from fxmerge.measure.study import Trial
from fxmerge.survey import survey
from tests.fakes import PriceTimer
from tests.test_cli import SMALL, folder  # noqa: F401


@pytest.fixture
def filled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.setattr("fxmerge.cli.survey", partial(survey, timer=PriceTimer()))
    path = tmp_path / "tables.db"
    assert main(["measure", "tests.small:network", "--data", str(folder), "--store", str(path), *SMALL]) == 0
    return path


def test_a_plan_from_a_store_is_the_plan_of_the_front(filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main(["solve", str(filled), "--budget", "1.3x", "--out", str(out)]) == 0
    assert "Plan: " in capsys.readouterr().out
    with fxmerge.Store(filled, read_only=True) as store:
        study = store.study()
    front = fxmerge.solve(study.region, study.candidates, study.latency, study.importance, study.fingerprint)
    assert fxmerge.Plan.load(out) == front.pick(int(front.original_ns / 1.3))


def test_the_front_is_printed_drawn_and_shows_what_was_measured(
    filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'fxmerge[plot]'")
    picture = tmp_path / "front.png"
    with fxmerge.Store(filled) as store:
        key = store.add_study(store.study())
        original, merged = (Measurement(ns, 0, 3, fxmerge.Target()) for ns in (3_000_000, 1_500_000))
        store.add_trial(key, Trial(fxmerge.Plan("print", (), 1_000_000, 0.25), original, merged))
    assert main(["front", str(filled), "--budget", "1.2x", "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "Front: " in text
    assert "2.000x" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["solve", "{}", "--budget", "fast"], "a budget is 1.5x \\(faster\\), 60% \\(of the latency\\) or 12.5ms; found 'fast'"),
        (["solve", "{}", "--budget", "0x"], "speedup must be a positive number"),
        (["solve", "{}", "--budget", "120%"], "fraction must be above 0 and at most 1"),
        (["solve", "{}", "--budget", "0.000001ms"], "no plan runs in"),
        (["solve", "{}", "--budget", "2x", "--study", "9"], "holds no study 9"),
        (["solve", "{}", "--budget", "2x", "--study", "99999999999999999999"], "too large"),
        (["solve", "{}.not", "--budget", "2x"], "no such file"),
        (["front", "{}", "--plot", "/nowhere/at/all.png"], "nowhere"),
        (["measure", "tests.small:network", "--store", "{}"], "give --data"),
        (["measure", "tests.small:network", "--data", ".", "--store", "{}", "--workers", "0"], "--workers takes a positive number"),
    ],
)
def test_a_refusal_is_one_line_and_status_1(
    arguments: list[str], text: str, filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([argument.format(filled) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(error)


@pytest.mark.parametrize(
    ("text", "expected"), [("2x", 500), (" 2 x ", 500), ("50%", 500), ("1.5ms", 1_500_000), ("1e-1ms", 100_000)]
)
def test_budgets_are_said_three_ways(text: str, expected: int) -> None:
    assert budget_ns(text, 1001) == expected


@pytest.mark.parametrize("text", ["", "x", "1.5", "-2x", "0.5x", "nan%", "1e400x", "infms", "1..2x", "0%", "2 y"])
def test_what_is_no_budget_is_told(text: str) -> None:
    with pytest.raises(fxmerge.InputError, match="budget|speedup|fraction|latency_ms"):
        budget_ns(text, 1000)


def test_an_interrupted_run_leaves_a_store_that_the_next_goes_on_with(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "tables.db"
    command = [sys.executable, "-m", "fxmerge", "measure", "tests.small:network", "--data", str(folder), "--store", str(path)]
    # Whoever runs the tests in the background has them ignore Ctrl-C, and so would this process.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    run = subprocess.Popen([*command, *SMALL], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _rows(path):
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    assert error.strip().splitlines()[-1].endswith("fxmerge: interrupted")
    assert "Traceback" not in error
    assert _rows(path)
    done = subprocess.run([*command, *SMALL], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with fxmerge.Store(path, read_only=True) as store:
        assert json.loads(json.dumps(store.studies())) == [[1, "Sequential"]]


def _rows(path: Path) -> int:
    if not path.exists():
        return 0
    try:
        with fxmerge.Store(path, read_only=True) as store:
            count: int = store._file._connection.execute("SELECT count(*) FROM sample").fetchone()[0]
            return count + store._file._connection.execute("SELECT count(*) FROM latency").fetchone()[0]
    except fxmerge.StoreError:
        return 0
