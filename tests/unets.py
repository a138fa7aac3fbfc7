"""Small diffusion networks of diffusers', with random weights: the CIFAR-10 DDPM's kinds of blocks, conditions, an autoencoder."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from fxmerge.analysis.candidates import propose
from fxmerge.analysis.segments import Findings, find_segments
from fxmerge.core.segment import Proposal
from fxmerge.graph.trace import trace


def unet(**options: Any) -> nn.Module:
    """The CIFAR-10 DDPM's kinds of blocks: residual, attention, pad and strided convolution, upsampling before a convolution."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "downsample_padding": 0,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }
    return _randomised(UNet2DModel(**{**settings, **options}))


def conditional() -> nn.Module:
    return _randomised(
        UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
        )
    )


def autoencoder() -> nn.Module:
    return _randomised(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 16),
            norm_num_groups=4,
            sample_size=16,
        )
    )


def _randomised(model: nn.Module) -> nn.Module:
    """Scales and shifts that are no ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1000, (batch,), generator=torch.Generator().manual_seed(seed))


#: name -> (model, its inputs for a batch, a size and a seed)
MODELS: dict[str, Any] = {
    "unet": (unet, lambda n, size, seed: (noise(n, 3, *size, seed=seed), times(n, seed))),
    "one time for all": (unet, lambda n, size, seed: (noise(n, 3, *size, seed=seed), times(1, seed)[0])),
    "classes": (
        lambda: unet(num_class_embeds=10),
        lambda n, size, seed: (noise(n, 3, *size, seed=seed), times(n, seed), times(n, seed) % 10),
    ),
    "average pools": (
        lambda: unet(downsample_type="resnet", upsample_type="resnet", down_block_types=("AttnDownBlock2D", "DownBlock2D")),
        lambda n, size, seed: (noise(n, 3, *size, seed=seed), times(n, seed)),
    ),
    "conditional": (
        conditional,
        lambda n, size, seed: (noise(n, 4, *size, seed=seed), times(n, seed), noise(n, 7, 12, seed=seed + 1)),
    ),
    "encoder": (lambda: autoencoder().encoder, lambda n, size, seed: (noise(n, 3, *size, seed=seed),)),
    "decoder": (lambda: autoencoder().decoder, lambda n, size, seed: (noise(n, 4, *size, seed=seed),)),
}


@cache
def searched(name: str) -> tuple[nn.Module, Findings, tuple[Proposal, ...]]:
    """A model in float64, what was found in it, and what is offered."""
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model = build().double()
    findings = find_segments(trace(model, inputs(2, (8, 8), 0)))
    return model, findings, propose(findings)
