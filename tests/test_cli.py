"""The command line: inspect and compress on small data made here; every refusal one line and status 1."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fxmerge import FxMergeError, Plan, compress
from fxmerge.cli import main
from tests.fakes import PriceTimer
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


def test_compress_writes_plan_weights_and_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxmerge.cli.fxmerge.compress", partial(compress, timer=PriceTimer()))
    weights = tmp_path / "weights.safetensors"
    save_file(network(seed=3).state_dict(), weights)
    out = tmp_path / "out"
    arguments = ["compress", "tests.small:network", "--weights", str(weights), "--data", str(folder), "--speedup", "1.3"]
    assert main([*arguments, *SMALL, "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {"plan.json", "student.safetensors", "report.txt"}
    assert "original, folded" in capsys.readouterr().out
    assert Plan.load(out / "plan.json").merges


def test_exact_needs_no_data(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing can be merged"):
        assert main(["compress", "tests.small:network", "--exact", *SMALL, "--out", str(tmp_path / "out")]) == 0


class Stop(FxMergeError):
    pass


@pytest.mark.parametrize(("batch", "images", "taken"), [("2", "20", 20), ("64", "20", 20), ("64", "99", 24), ("4", "1", 1)])
def test_the_batch_is_the_one_asked_for_however_few_images_there_are(
    folder: Path,
    tmp_path: Path,
    batch: str,
    images: str,
    taken: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def check(model: Any, example: Tensor, *, calibration: Tensor, **_: Any) -> None:
        assert example.shape == (int(batch), 3, 8, 20)
        assert calibration.shape == (taken, 3, 8, 20)
        assert {image.numpy().tobytes() for image in example} <= {image.numpy().tobytes() for image in calibration}
        raise Stop("seen")

    monkeypatch.setattr("fxmerge.cli.fxmerge.compress", check)
    arguments = ["compress", "tests.small:network", "--data", str(folder), "--size", "8", "20", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--batch", batch, "--images", images]) == 1
    assert "Stop: seen" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compress", "demo"])
@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    folder: Path, tmp_path: Path, name: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("fxmerge.cli.fxmerge.compress", None)
    monkeypatch.setattr("fxmerge.demo.run_demo", None)
    arguments = [command, *(["tests.small:network", "--data", str(folder), "--size", "12"] if command == "compress" else [])]
    assert main([*arguments, "--speedup", "1.2", "--out", str(tmp_path / name)]) == 1
    assert f"--out {tmp_path / name} is no directory that can be written to" in capsys.readouterr().err


def raises() -> nn.Module:
    raise RuntimeError("no GPU")


def raises_without_a_word() -> nn.Module:
    raise KeyError


COMPRESS = ["compress", "tests.small:network", "--speedup", "1.2", "--out", "x"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect", "resnet18"], "MODEL is package.module:factory or torchvision:NAME, found 'resnet18'"),
        (["inspect", "nowhere.at_all:make"], "cannot make nowhere.at_all:make"),
        (["inspect", "torchvision:resnet1"], "cannot make torchvision:resnet1"),
        (["inspect", "tests.small:images"], "cannot make tests.small:images"),
        (["inspect", "tests.test_cli:raises"], "cannot make tests.test_cli:raises: RuntimeError: no GPU"),
        (["inspect", "tests.test_cli:raises_without_a_word"], "cannot make tests.test_cli:raises_without_a_word: KeyError"),
        (["inspect", "tests.small:network", "--weights", "missing.pt"], "no such file: missing.pt"),
        (["inspect", "tests.small:network", "--size", "0"], "--size takes one or two positive numbers, found 0"),
        (["inspect", "tests.small:network", "--size", "8", "8", "8"], "--size takes one or two positive numbers, found 8 8 8"),
        (["inspect", "tests.small:network", "--batch", "0"], "--batch takes a positive number, found 0"),
        (["inspect", "tests.small:network", "--channels", "-1"], "--channels takes a positive number, found -1"),
        (["inspect", "tests.small:network", "--channels", "4", "--size", "12"], "the model rejects the example inputs"),
        (COMPRESS, "give --data"),
        ([*COMPRESS, "--data", "missing"], "cannot read missing"),
        ([*COMPRESS, "--data", "CIFAR10:missing"], "cannot read CIFAR10"),
        ([*COMPRESS, "--data", "FakeData:x"], "cannot read FakeData:x: TypeError"),
        ([*COMPRESS, "--data", "missing", "--images", "0"], "--images takes a positive number, found 0"),
        ([*COMPRESS, "--data", "missing", "--images", "-1"], "--images takes a positive number, found -1"),
        ([*COMPRESS, "--data", "missing", "--batch", "-1"], "--batch takes a positive number, found -1"),
        ([*COMPRESS, "--data", "missing", "--size", "-4"], "--size takes one or two positive numbers, found -4"),
        ([*COMPRESS, "--data", "missing", "--std", "0"], "--std is divided by, so it takes positive numbers"),
        ([*COMPRESS, "--data", "missing", "--channels", "1"], "ImageNet's are for 3 channels, not 1"),
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


@pytest.mark.parametrize(
    ("held", "text"),
    [
        (torch.ones(3), "is not a state dict of tensors: it holds a Tensor"),
        ([1, 2], "is not a state dict of tensors: it holds a list"),
        ({"state_dict": None}, "is not a state dict of tensors: it holds a NoneType"),
        ({"epoch": 3}, "is not a state dict of tensors: it holds a dict"),
        ({"weight": torch.ones(3)}, "does not fit tests.small:network"),
    ],
)
def test_weights_that_are_no_state_dict_are_told(tmp_path: Path, held: Any, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(held, tmp_path / "weights.pt")
    assert main(["inspect", "tests.small:network", "--weights", str(tmp_path / "weights.pt"), *SMALL]) == 1
    assert text in capsys.readouterr().err


def test_a_weights_file_that_is_empty_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.pt").touch()
    assert main(["inspect", "tests.small:network", "--weights", str(tmp_path / "weights.pt"), *SMALL]) == 1
    assert "is not a state dict of tensors: EOFError" in capsys.readouterr().err


def test_a_checkpoint_that_holds_a_state_dict_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": network(seed=3).state_dict(), "epoch": 1}, tmp_path / "weights.pt")
    assert main(["inspect", "tests.small:network", "--weights", str(tmp_path / "weights.pt"), *SMALL]) == 0
