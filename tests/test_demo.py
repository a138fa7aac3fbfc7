"""The demo, in small: real digits, a counting timer, one epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fxmerge
from fxmerge.demo import digits_network, load_digits, run_demo
from tests.fakes import PriceTimer

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'fxmerge[demo]'")


def test_it_prints_one_table_and_leaves_plan_weights_and_report(tmp_path: Path) -> None:
    text = run_demo(tmp_path, speedup=1.4, epochs=(1, 1), trials=2, timer=PriceTimer(), progress=False)
    rows = [line for line in text.splitlines() if line.startswith(("original", "compressed"))]
    assert [row.split("  ")[0] for row in rows] == [
        "original, batch norms folded",
        "compressed, no training",
        "compressed, fine-tuned",
    ]
    assert "predicted" in text
    assert (tmp_path / "report.txt").read_text(encoding="utf-8").strip() in text
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["merges"]
    loaded = fxmerge.load(tmp_path, model=digits_network())
    images = load_digits()[2]
    with torch.no_grad():
        fxmerge.testing.assert_equivalent(loaded.student, loaded.model, [(images,)], tolerance=1e-4)


def test_the_test_images_are_no_training_images() -> None:
    train, _, test, labels = load_digits()
    assert (len(train), len(test), tuple(test.shape[1:])) == (1347, 450, (1, 8, 8))
    assert sorted(set(labels.tolist())) == list(range(10))
