"""Calibration images from small data sets made here, in the formats that they have on disk."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from fxmerge.data import IMAGENET, read_images
from fxmerge.errors import CalibrationError, InputError

PLAIN: dict[str, Any] = {"mean": [0.0], "std": [1.0]}


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, three pictures each, of 10 x 12; one is grey."""
    root = tmp_path_factory.mktemp("images")
    for number in range(6):
        home = root / ("cat", "dog")[number % 2]
        home.mkdir(exist_ok=True)
        picture = pixels(10, 12, 3, seed=number) if number else pixels(10, 12)
        Image.fromarray(picture.numpy()).save(home / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = pixels(4, 28, 28).numpy().tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 4, 28, 28) + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 4) + bytes(4))
    return f"MNIST:{root}"


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """CIFAR-10 as it is unpacked, with four images a batch. Its pickles are made here, so the checksums of the real ones, which
    torchvision asks for before it unpickles, cannot hold: that check alone is left out."""
    home = tmp_path / "cifar-10-batches-py"
    home.mkdir()
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        batch = {"data": pixels(4, 3072, seed=number).numpy(), "labels": [0, 1, 2, 3]}
        (home / name).write_bytes(pickle.dumps(batch))
    (home / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return f"CIFAR10:{tmp_path}"


def test_a_directory_of_pictures_is_read(folder: Path) -> None:
    images = read_images(str(folder), count=100, size=(10, 12), **PLAIN)
    assert images.shape == (6, 3, 10, 12)
    assert images.dtype == torch.float32
    expected = sorted(float(pixels(10, 12, 3, seed=n).double().mean() / 255) for n in range(1, 6))
    found = sorted(float(image.double().mean()) for image in images)
    assert all(any(abs(a - b) < 1e-6 for b in found) for a in expected)


def test_images_are_normalised_by_imagenet_where_nothing_is_said(folder: Path) -> None:
    plain = read_images(str(folder), count=3, size=(6, 6), **PLAIN)
    shift, scale = (torch.tensor(part).view(-1, 1, 1) for part in IMAGENET)
    assert torch.equal(read_images(str(folder), count=3, size=(6, 6)), (plain - shift) / scale)


def test_as_many_are_taken_as_asked_for_and_always_the_same(folder: Path) -> None:
    images = read_images(str(folder), count=2, size=(8, 20))
    assert images.shape == (2, 3, 8, 20)
    torch.manual_seed(7)
    assert torch.equal(images, read_images(str(folder), count=2, size=(8, 20)))


def test_coloured_pictures_become_grey_where_one_channel_is_asked_for(folder: Path) -> None:
    assert read_images(str(folder), count=2, size=(8, 8), channels=1, **PLAIN).shape == (2, 1, 8, 8)


def test_cifar10_on_disk_is_read(cifar: str) -> None:
    images = read_images(cifar, count=100, size=(32, 32), **PLAIN)
    assert images.shape == (20, 3, 32, 32)
    stored = torch.cat([pixels(4, 3072, seed=n) for n in range(5)]).view(-1, 3, 32, 32).float() / 255
    assert all(bool((stored - image).abs().amax((1, 2, 3)).min() < 1e-6) for image in images)


def test_mnist_on_disk_is_read(mnist: str) -> None:
    images = read_images(mnist, count=100, size=(28, 28), channels=1, **PLAIN)
    assert images.shape == (4, 1, 28, 28)
    assert sorted(images.flatten(1).sum(1).tolist()) == pytest.approx(sorted((pixels(4, 784).float() / 255).sum(1).tolist()))


def test_images_of_other_channels_are_told(mnist: str) -> None:
    with pytest.raises(InputError, match="holds images of 1 channels, and 3 are asked for; give --channels 1"):
        read_images(mnist, count=4, size=(8, 8))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"channels": 1}, "ImageNet's are for 3 channels, not 1"),
        ({"mean": [0.5, 0.5]}, "--mean takes one finite number, or one for each of 3 channels; found"),
        ({"std": [0.5] * 4}, "--std takes one finite number, or one for each of 3 channels; found"),
        ({"mean": [float("nan")]}, "--mean takes one finite number"),
        ({"std": [1.0, 0.0, 1.0]}, "--std is divided by, so it takes positive numbers"),
        ({"std": [-1.0]}, "--std is divided by, so it takes positive numbers"),
    ],
)
def test_a_normalisation_that_does_not_fit_is_told(folder: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        read_images(str(folder), count=2, size=(8, 8), **options)


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "FakeData:x",
        "VisionDataset:x",
        "utils:x",
        "CIFAR10:missing",
        "CIFAR10:",
        "Kinetics:x",
        "wrap_dataset_for_transforms_v2:x",
    ],
)
def test_what_cannot_be_read_is_told(name: str) -> None:
    with pytest.raises(InputError, match=f"cannot read {name}: [A-Z][A-Za-z]+"):
        read_images(name, count=2, size=(8, 8))


def test_a_picture_that_is_damaged_is_told(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot read .*: UnidentifiedImageError: cannot identify image file"):
        read_images(str(tmp_path), count=2, size=(8, 8))


def test_a_data_set_without_images_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.ImageFolder.__len__", lambda self: 0)
    with pytest.raises(CalibrationError, match="holds no images"):
        read_images(str(folder), count=2, size=(8, 8))
