"""The ImageNet benchmark from one end to the other, on a tiny ImageFolder made here, with weights of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fxmerge
from benchmarks import imagenet
from benchmarks.made_up import MadeUp
from tests.fakes import PriceTimer
from tests.launches import launched


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes, eight pictures each to train on and four to be judged by."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (3, 40, 48), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return tmp_path / "imagenet"


@pytest.mark.filterwarnings("ignore:.*too few")
@pytest.mark.parametrize("method", ["fxmerge", "layermerge"])
def test_a_row_is_compressed_trained_and_reported(method: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights, out = tmp_path / "weights.safetensors", tmp_path / "out"
    save_file(torchvision.models.mobilenet_v2(weights=None, num_classes=2).state_dict(), weights)
    monkeypatch.setattr(imagenet, "TIMER", PriceTimer())
    monkeypatch.setattr(imagenet, "SCORER", MadeUp())
    command = [
        *("--data", str(data), "--row", "mobilenet_v2-1.63", "--out", str(out), "--method", method, "--weights", str(weights)),
        *("--calibration", "8", "--epochs", "1", "--batch", "4", "--latency-batch", "2", "--size", "32", "--workers", "0"),
    ]
    report = imagenet.main(command)
    rows = json.loads((out / "row.json").read_text(encoding="utf-8"))["rows"]
    assert [row[0] for row in rows] == [
        "original, folded",
        "compressed, not trained",
        "compressed, trained",
        "published: original",
        "published: compressed",
    ]
    assert rows[-1][1:] == ["72.99", "", "1.63x"]
    assert float(rows[2][3].removesuffix("x")) >= 1.63 / 1.03
    assert (out / "row.md").read_text(encoding="utf-8").strip() == report
    model = imagenet.network("mobilenet_v2", weights)
    before, after = (fxmerge.load(out / name, model).student for name in ("start", "trained"))
    assert before.state_dict().keys() == after.state_dict().keys()
    made = list(before.state_dict())
    if method == "layermerge":  # nothing is fitted: what stays is as it was
        original = model.state_dict()
        assert all(torch.equal(original[name], before.state_dict()[name]) for name in made if name in original)
    assert imagenet.main(command) == report  # it goes on where it was: nothing is left to do
    with pytest.raises(SystemExit, match=f"out holds what was made with --method {method}; give another --out"):
        imagenet.main([*command, "--method", "fxmerge" if method == "layermerge" else "layermerge"])


@pytest.mark.filterwarnings("ignore:.*too few")
def test_a_row_of_the_deeper_network_by_two_processes(data: Path, tmp_path: Path) -> None:
    """The first process compresses and reports."""
    torch.manual_seed(0)
    weights, out = tmp_path / "weights.safetensors", tmp_path / "out"
    save_file(torchvision.models.resnet34(weights=None, num_classes=2).state_dict(), weights)
    done = launched(
        "tests.benchmarks.launched_imagenet",
        *("--data", str(data), "--row", "resnet34-1.36", "--out", str(out)),
        *("--method", "layermerge", "--weights", str(weights), "--calibration", "4", "--epochs", "1", "--batch", "4"),
        *("--latency-batch", "1", "--size", "32", "--workers", "0"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((out / "row.json").read_text(encoding="utf-8"))["rows"]
    assert rows[-1][1:] == ["74.26", "", "1.36x"]
    assert float(rows[2][3].removesuffix("x")) >= 1.36 / 1.03
    assert done.stdout.count("| compressed, trained") == 1
    start, trained = (load_file(out / name / "student.safetensors") for name in ("start", "trained"))
    assert start.keys() == trained.keys()
    with safe_open(out / "checkpoints" / "training.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["about"])["position"]["step"] == 4  # of 2 images for each process


def test_weights_of_another_kind_or_network_are_told(tmp_path: Path) -> None:
    pickled, other = tmp_path / "weights.pth", tmp_path / "other.safetensors"
    torch.save({"fc.weight": torch.zeros(2, 512)}, pickled)
    save_file({"fc.weight": torch.zeros(2, 512)}, other)
    with pytest.raises(SystemExit, match="must be a state dict in safetensors, and .*weights.pth is none"):
        imagenet.network("resnet34", pickled)
    with pytest.raises(SystemExit, match="holds no classifier.1.weight: .* is of another network than mobilenet_v2"):
        imagenet.network("mobilenet_v2", other)


def test_every_published_row_has_a_protocol() -> None:
    assert {row.network for row in imagenet.ROWS.values()} == set(imagenet.PROTOCOLS)
    assert len(imagenet.ROWS) == 7
    assert imagenet.recipe(imagenet.PROTOCOLS["resnet34"], 90, "layermerge").warm_up == pytest.approx(8 / 90)
