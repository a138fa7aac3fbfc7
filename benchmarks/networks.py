"""Networks and data that the benchmarks read from a folder beside the repository; nothing here is part of the library."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

#: Where `cifar10-jpeg.tar.xz`, unpacked, lies; and the state dicts.
DATA = Path(os.environ.get("FXMERGE_DATA", "../shared/data"))
WEIGHTS = Path(os.environ.get("FXMERGE_WEIGHTS", "../shared/weights"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions beside an option-A shortcut (He et al. 2016): strided slice, channels padded with zeros."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - width_in
        self.shortcut: nn.Module | None = None  # a layer that does as the slice and the zeros do, where one is wanted

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        y += x
        return F.relu(y, inplace=True)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2; ``width`` 1 is as published, 0.5 has half of all channels."""

    def __init__(self, depth: int, width: float = 1.0) -> None:
        super().__init__()
        n = (depth - 2) // 6
        one, two, three = (max(1, round(width * channels)) for channels in (16, 32, 64))
        self.conv1 = nn.Conv2d(3, one, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(one)
        self.layer1 = nn.Sequential(*(Block(one, one, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(*(Block(one if i == 0 else two, two, 2 if i == 0 else 1) for i in range(n)))
        self.layer3 = nn.Sequential(*(Block(two if i == 0 else three, three, 2 if i == 0 else 1) for i in range(n)))
        self.linear = nn.Linear(three, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def made(name: str, width: float = 1.0) -> nn.Module:
    """A network without weights: ``resnet`` and its depth, 6n + 2, or ``mobilenet_v2`` with a stem of stride 1.

    Args:
        name: of the architecture.
        width: of all channels, as a fraction; mobilenet_v2 rounds to multiples of 8, as published.
    """
    if name == "mobilenet_v2":
        network = torchvision.models.mobilenet_v2(num_classes=10, width_mult=width)
        network.features[0][0].stride = (1, 1)
        return network
    if not re.fullmatch(r"resnet\d+", name) or (int(name[6:]) - 2) % 6:
        raise ValueError(f"--network is {name}; give mobilenet_v2, or resnet and a depth of 6n + 2")
    return CifarResNet(int(name.removeprefix("resnet")), width)


def pretrained(name: str) -> nn.Module | None:
    """The network with the weights that lie beside the repository, or none."""
    path = WEIGHTS / f"{name}_cifar10_jpeg.pt"
    if not path.exists():
        return None
    network = made(name)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def cache() -> Path:
    """The folder for what is made once: decoded images, weights trained by a benchmark."""
    return Path(os.environ.get("FXMERGE_CACHE", Path.home() / ".cache" / "fxmerge"))


def normalised(pixels: Tensor) -> Tensor:
    """Bytes (N, 3, H, W) as the networks take them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return (pixels - mean) / std


def pixels(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32), bytes, and labels, of ``train`` or ``test``; decoded once, then kept as an array beside."""
    file = cache() / f"cifar10-jpeg-{split}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_decoded(split), file)
    images, labels = torch.load(file, weights_only=True)
    return images, labels


def _decoded(split: str) -> tuple[Tensor, Tensor]:
    import tarfile
    import tempfile

    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2.functional import pil_to_tensor

    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(DATA / "cifar10-jpeg.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        root = next(path for path in Path(folder).rglob(split) if path.is_dir())
        files = ImageFolder(str(root))
        return torch.stack([pil_to_tensor(image) for image, _ in files]), torch.tensor(files.targets)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Top-1, percent."""
    with torch.inference_mode():
        hits = [(network(x).argmax(1) == y).sum() for x, y in zip(images.split(batch), labels.split(batch), strict=True)]
    return 100.0 * float(torch.stack(hits).sum()) / len(labels)
