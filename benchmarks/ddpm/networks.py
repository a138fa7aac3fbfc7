"""The two U-Nets of diffusers', and the classifier whose features tell samples from images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

#: Of noise over the time steps, as in DDPM (Ho, Jain, Abbeel 2020); for diffusers' schedulers.
SCHEDULE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def small_unet(widths: Sequence[int], channels: int, layers: int = 2) -> UNet2DModel:
    """For 16x16 pixels: residual blocks of group norms and SiLU, attention at 8x8 and in the middle, random weights."""
    kinds = ["AttnDownBlock2D" if level == 1 else "DownBlock2D" for level in range(len(widths))]
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        down_block_types=tuple(kinds),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        norm_num_groups=8,
        attention_head_dim=None,
    ).eval()


def cifar_unet(width: int = 128) -> UNet2DModel:
    """The configuration of google/ddpm-cifar10-32 (35.7 M parameters at its width, 128), random weights."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        center_input_sample=False,
        time_embedding_type="positional",
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        layers_per_block=2,
        mid_block_scale_factor=1,
        downsample_padding=0,
        act_fn="silu",
        attention_head_dim=None,
        norm_num_groups=min(32, width),
        norm_eps=1e-6,
    ).eval()


class Classifier(nn.Module):
    """Three convolutions, features of 64 numbers, classes."""

    def __init__(self, channels: int, classes: int = 10, features: int = 64) -> None:
        super().__init__()
        widths = (channels, 16, 32, features)
        layers = [
            (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)) for a, b in itertools.pairwise(widths)
        ]
        self.features = nn.Sequential(*(layer for row in layers for layer in row), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.features(x))
        return found


class Features(nn.Module):
    """The features of a classifier, as torchmetrics asks for them."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.network = classifier.features
        self.num_features = classifier.head.in_features

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x)
        return found
