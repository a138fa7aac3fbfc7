"""A small residual network and images with structure, for tests of the whole pipeline."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


def network(width: int = 8, blocks: int = 3, seed: int = 0) -> nn.Sequential:
    """Stem, residual blocks, a strided convolution, a classifier; norms that have seen data. 3 x 12 x 12 images."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers += [Residual(width) for _ in range(blocks)]
    layers += [nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5)]
    made = nn.Sequential(*layers).train()
    with torch.no_grad():
        for _ in range(10):
            made(images(32, seed=1))
    return made.eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth random images, (count, 3, 12, 12)."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, size=(12, 12), mode="bilinear", align_corners=False)
