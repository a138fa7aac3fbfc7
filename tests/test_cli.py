"""The command line: inspect and compress on small data made here; every refusal one line and status 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fxmerge import Plan
from fxmerge.cli import main
from tests.small import network

SMALL = ["--size", "12", "--batch", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of two classes, twelve pictures each."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        (root / label).mkdir()
        for number in range(12):
            pixels = torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(root / label / f"{number}.png")
    return root


def test_inspect_prints_nodes_segments_candidates_and_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tests.small:network", *SMALL]) == 0
    text = capsys.readouterr().out
    for part in ("Nodes", "Segments and candidates", "Refusals", "_2 -> _3_relu_1", "fitted", "AdaptiveAvgPool2d", "opaque node"):
        assert part in text


def test_inspect_knows_torchvision_by_its_short_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "torchvision:resnet18", "--size", "32", "--batch", "1"]) == 0
    assert "layer1_0_relu_1 -> layer1_1_relu_1" in capsys.readouterr().out


def test_compress_writes_plan_weights_and_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(network(seed=3).state_dict(), weights)
    out = tmp_path / "out"
    arguments = ["compress", "tests.small:network", "--weights", str(weights), "--data", str(folder), "--fraction", "1.0"]
    assert main([*arguments, *SMALL, "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {"plan.json", "student.safetensors", "about.json", "report.txt"}
    assert "original, folded" in capsys.readouterr().out
    Plan.load(out / "plan.json")


def test_exact_needs_no_data(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing can be merged"):
        assert main(["compress", "tests.small:network", "--exact", *SMALL, "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect", "resnet18"], "MODEL is package.module:factory or torchvision:NAME, found 'resnet18'"),
        (["inspect", "nowhere.at_all:make"], "cannot make nowhere.at_all:make"),
        (["inspect", "torchvision:resnet1"], "cannot make torchvision:resnet1"),
        (["inspect", "tests.small:images"], "cannot make tests.small:images"),
        (["inspect", "tests.small:network", "--weights", "missing.pt"], "no such file: missing.pt"),
        (["inspect", "tests.small:network", "--size", "0"], "--size takes one or two positive numbers"),
        (["inspect", "tests.small:network", "--channels", "4", "--size", "12"], "the model rejects the example inputs"),
        (["compress", "tests.small:network", "--speedup", "1.2", "--out", "x"], "give --data"),
        (["compress", "tests.small:network", "--data", "missing", "--speedup", "1.2", "--out", "x"], "cannot read missing"),
        (["compress", "tests.small:network", "--data", "CIFAR10:missing", "--speedup", "1.2", "--out", "x"], "cannot read CIFAR10"),
    ],
)
def test_a_refusal_is_one_line_and_status_1(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_a_weights_file_that_is_a_pickle_of_code_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"weight": network}, path)
    assert main(["inspect", "tests.small:network", "--weights", str(path), *SMALL]) == 1
    assert "is not a state dict of tensors" in capsys.readouterr().err
