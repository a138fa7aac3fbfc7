"""Networks and data that the benchmarks read from a folder beside the repository; nothing here is part of the library."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
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
        self.stride, self.width = stride, width

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.stride != 1:
            quarter = self.width // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        y += x
        return F.relu(y, inplace=True)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(*(Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(n)))
        self.layer3 = nn.Sequential(*(Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(n)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet(name: str) -> CifarResNet:
    """``resnet20`` or ``resnet56`` with the weights that lie beside the repository."""
    network = CifarResNet(int(name.removeprefix("resnet")))
    network.load_state_dict(torch.load(WEIGHTS / f"{name}_cifar10_jpeg.pt", weights_only=True))
    return network.eval()


def cifar10(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32), normalised, and labels, of ``train`` or ``test``; decoded once, then kept as an array beside."""
    cache = Path(os.environ.get("FXMERGE_CACHE", Path.home() / ".cache" / "fxmerge")) / f"cifar10-jpeg-{split}.pt"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_decoded(split), cache)
    pixels, labels = torch.load(cache, weights_only=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std, labels


def _decoded(split: str) -> tuple[Tensor, Tensor]:
    import tarfile
    import tempfile

    from torchvision.datasets import ImageFolder
    from torchvision.io import decode_image

    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(DATA / "cifar10-jpeg.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        root = next(path for path in Path(folder).rglob(split) if path.is_dir())
        files = ImageFolder(str(root))
        return torch.stack([decode_image(path) for path, _ in files.samples]), torch.tensor(files.targets)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Top-1, percent."""
    with torch.inference_mode():
        hits = [(network(x).argmax(1) == y).sum() for x, y in zip(images.split(batch), labels.split(batch), strict=True)]
    return 100.0 * float(torch.stack(hits).sum()) / len(labels)
