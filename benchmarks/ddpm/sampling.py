"""Sampling by DDIM from given noise, its time, and how far samples are from images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from benchmarks.ddpm.networks import SCHEDULE, Features
from fxmerge.core.leaves import leaves


def prediction(output: object) -> Tensor:
    """The first tensor of what a network gives, a dataclass or a tuple."""
    return next(leaf for leaf in leaves(output) if isinstance(leaf, Tensor))


@torch.no_grad()
def ddim(network: nn.Module, noise: Tensor, steps: int) -> Tensor:
    """Images that a network makes of noise, deterministic; networks take (image, time step of each)."""
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=True)
    scheduler.set_timesteps(steps, device=noise.device)
    images = noise
    for t in scheduler.timesteps:
        images = scheduler.step(prediction(network(images, t.expand(len(images)))), t, images).prev_sample
    return images.clamp(-1, 1)


def noise(shape: Sequence[int], seed: int, device: str = "cpu") -> Tensor:
    """Standard normal, the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device)


@dataclass(frozen=True)
class Ratio:
    """How many times faster, round by round: the median, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Ratio:
        """
        >>> Ratio.of([2.0, 2.0, 4.0], [1.0, 2.0, 1.0])
        Ratio(median=2.0, low=1.0, high=4.0)
        """
        ratios = sorted(a / b for a, b in zip(before, after, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        return cls(statistics.median(ratios), low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def seconds_in_turn(networks: Sequence[nn.Module], start: Tensor, steps: int, rounds: int) -> list[list[float]]:
    """Seconds of whole samplings, of every network one in every round, in an order that turns round."""
    found: list[list[float]] = [[] for _ in networks]
    for network in networks:
        ddim(network, start, 2)  # warm up
    for turn in range(rounds):
        order = list(range(len(networks)))
        for index in order if turn % 2 == 0 else reversed(order):
            _wait(start)
            begun = time.perf_counter()
            ddim(networks[index], start, steps)
            _wait(start)
            found[index].append(time.perf_counter() - begun)
    return found


def _wait(there: Tensor) -> None:
    if there.is_cuda:
        torch.cuda.synchronize(there.device)


@torch.no_grad()
def frechet_distance(features: Features, real: Tensor, made: Tensor) -> float:
    """Between the features of two sets of images, each taken for normally distributed; not the FID, whose features are others."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=features)
    for images, is_real in ((real, True), (made, False)):
        for part in images.split(500):
            metric.update(part, real=is_real)
    return float(metric.compute())
