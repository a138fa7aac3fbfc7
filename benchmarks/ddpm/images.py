"""Images of 16x16 pixels in -1..1, to learn to draw: handwritten digits that scikit-learn ships, or CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 16
#: Images of the hold-out: of the digits' 1,797; of CIFAR-10's test images.
_HELD_OUT = {"digits": 297, "cifar10": 1024}


@dataclass(frozen=True, eq=False)
class Images:
    """To train on, and held out; (N, C, 16, 16) and their classes (N,)."""

    train: Tensor
    train_classes: Tensor
    holdout: Tensor
    holdout_classes: Tensor

    @property
    def channels(self) -> int:
        return self.train.shape[1]


def images(name: str) -> Images:
    """``digits`` (8x8, enlarged bilinearly) or ``cifar10`` (the JPEG copy beside the repository, every four pixels averaged)."""
    count = _HELD_OUT[name]
    if name == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        small = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
        pixels, classes = F.interpolate(small, (SIZE, SIZE), mode="bilinear"), torch.tensor(found.target)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        pixels, classes = pixels[order], classes[order]
        return Images(pixels[count:], classes[count:], pixels[:count], classes[:count])
    from benchmarks.networks import pixels as of_cifar10

    parts = [(F.avg_pool2d(x.float() / 127.5 - 1, 2), y) for x, y in map(of_cifar10, ("train", "test"))]
    (train, train_classes), (test, test_classes) = parts
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:count]
    return Images(train, train_classes, test[order], test_classes[order])
