"""Calibration images from what lies on disk: a directory of pictures, or one of torchvision's data sets by its name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.errors import CalibrationError, InputError

#: Of ImageNet's training images in 0..1, by colour: mean and standard deviation.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def read_images(
    source: str,
    *,
    count: int,
    size: tuple[int, int],
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Some images of a data set, normalised; the same ones every time.

    Args:
        source: a directory with a folder for every class, or NAME:ROOT of a torchvision data set on disk (CIFAR10:/data).
        count: how many to take, if there are so many.
        size: height and width to resize them to.
        channels: 3 for colour; with 1, coloured images become grey.
        mean: subtracted from values in 0..1: one number, or one a channel; None for ImageNet's, which has three.
        std: ... which are then divided by this.

    Returns:
        (N, channels, height, width), float32.

    Raises:
        InputError: the data set cannot be read, has other channels, or mean and std do not fit.
        CalibrationError: it holds no images.
    """
    shift, scale = _normalisation(mean, std, channels)
    try:
        dataset = _opened(source, size, grey=channels == 1)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
        images = [dataset[int(i)][0] for i in order]
    except Exception as fault:  # other people's readers raise anything
        raise InputError(f"cannot read {source}: {in_a_line(fault)}") from fault
    if not images:
        raise CalibrationError(f"{source} holds no images")
    found = sorted({image.shape[0] for image in images} - {channels})
    if found:
        raise InputError(f"{source} holds images of {found[0]} channels, and {channels} are asked for; give --channels {found[0]}")
    return (torch.stack(images) - shift) / scale


def in_a_line(fault: BaseException) -> str:
    """What an exception of other people's code says, with its type: its message alone is empty or a bare word too often."""
    said = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {said[0]}" if said else type(fault).__name__


def _opened(source: str, size: tuple[int, int], *, grey: bool) -> Any:
    from torchvision import datasets
    from torchvision.transforms import v2

    steps = [v2.ToImage(), *([v2.Grayscale()] if grey else []), v2.Resize(list(size), antialias=True)]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
    name, _, root = source.partition(":")
    if root and name in datasets.__all__:
        return getattr(datasets, name)(root, transform=transform)
    return datasets.ImageFolder(source, transform=transform)


def _normalisation(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (C or 1, 1, 1)."""
    if channels != 3 and (mean is None or std is None):
        raise InputError(f"give --mean and --std, as your network was trained with: ImageNet's are for 3 channels, not {channels}")
    for name, given in (("mean", mean), ("std", std)):
        if given is not None and (len(given) not in (1, channels) or not all(map(math.isfinite, given))):
            raise InputError(f"--{name} takes one finite number, or one for each of {channels} channels; found {list(given)}")
    shift, scale = (torch.tensor(g or default).view(-1, 1, 1) for g, default in zip((mean, std), IMAGENET, strict=True))
    if float(scale.min()) <= 0:
        raise InputError(f"--std is divided by, so it takes positive numbers; found {scale.flatten().tolist()}")
    return shift, scale
