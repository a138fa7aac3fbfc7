"""Training: of the small U-Net and the classifier from nothing, of students for a short while. All resumed where they stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx import GraphModule

import fxmerge
from benchmarks.ddpm.images import Images
from benchmarks.ddpm.networks import SCHEDULE, Classifier
from benchmarks.ddpm.sampling import prediction
from fxmerge.measure.progress import Bars
from fxmerge.tune import Distillation, Recipe, fine_tune
from fxmerge.tune.feed import Data

#: Steps between two checkpoints.
_CHECKPOINT = 100


@dataclass(frozen=True, eq=False)
class Noised:
    """Batches ((noisy images, time steps), noise) of DDPM's training: image, time step and noise at random, by the epoch's number.

    Args:
        images: clean ones, (N, C, H, W).
        steps: batches an epoch.
        batch: images a batch.
        seed: of the first epoch.
    """

    images: Tensor
    steps: int
    batch: int
    seed: int

    def __len__(self) -> int:
        return self.steps

    def __call__(self, epoch: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        scheduler = DDPMScheduler(**SCHEDULE)
        for _ in range(self.steps):
            clean = self.images[torch.randint(len(self.images), (self.batch,), generator=generator)]
            times = torch.randint(scheduler.config.num_train_timesteps, (self.batch,), generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            yield (scheduler.add_noise(clean, noise, times), times), noise


@dataclass(frozen=True, eq=False)
class Classified:
    """Batches (images, classes) of a classifier's training, moved by up to a pixel."""

    images: Images
    steps: int
    batch: int

    def __len__(self) -> int:
        return self.steps

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(self.steps):
            chosen = torch.randint(len(self.images.train), (self.batch,), generator=generator)
            down, right = (torch.randint(-1, 2, (2,), generator=generator)).tolist()
            yield self.images.train[chosen].roll((down, right), (2, 3)), self.images.train_classes[chosen]


def noise_loss(output: Any, noise: Tensor) -> Tensor:
    """DDPM's simple loss, a scalar."""
    return F.mse_loss(prediction(output).float(), noise.float())


def adam(learning_rate: float) -> Callable[..., torch.optim.Optimizer]:
    """AdamW without decay."""
    return partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0)


def trained_unet(graph: GraphModule, images: Images, steps: int, batch: int, cache: Path, bars: Bars) -> GraphModule:
    """The U-Net, traced, given trained weights: Adam at 1e-3 along a cosine, clipped to 1, averaged over 5 % of the steps."""
    recipe = Recipe(
        epochs=1, optimiser=adam(1e-3), clip=1.0, average=0.05, loss=noise_loss, metric=noise_loss, checkpoint_steps=_CHECKPOINT
    )
    graph.load_state_dict(_weights(graph, Noised(images.train, steps, batch, seed=0), recipe, cache / "unet", bars))
    return graph.eval()


def trained_classifier(images: Images, steps: int, cache: Path, bars: Bars) -> Classifier:
    """A classifier of the same images."""
    torch.manual_seed(0)
    model = Classifier(images.channels).eval()
    recipe = Recipe(epochs=1, optimiser=adam(3e-3), average=0.05, checkpoint_steps=_CHECKPOINT)
    graph = fxmerge.trace(model, images.train[:2])
    model.load_state_dict(_weights(graph, Classified(images, steps, 64), recipe, cache / "classifier", bars))
    return model


def _weights(graph: GraphModule, data: Data, recipe: Recipe, place: Path, bars: Bars) -> dict[str, Tensor]:
    """What training gives, or gave."""
    weights = place.with_suffix(".safetensors")
    if not weights.exists():
        found = fine_tune(graph, data, recipe=recipe, checkpoints=place, progress=bars(f"train {place.name}"))
        save_file({name: tensor.contiguous() for name, tensor in found.state_dict().items()}, weights)
    return load_file(weights)


def tuned(
    student: GraphModule, original: GraphModule, images: Images, steps: int, batch: int, place: Path, bars: Bars
) -> GraphModule:
    """A student after a short training: half of the loss is DDPM's, half the original's outputs, a little its cuts."""
    recipe = Recipe(
        epochs=1,
        optimiser=adam(3e-4),
        clip=1.0,
        average=0.1,
        loss=noise_loss,
        metric=noise_loss,
        distillation=Distillation(share=0.5, features=0.1),
        checkpoint_steps=_CHECKPOINT,
    )
    data = Noised(images.train, steps, batch, seed=1_000)
    return fine_tune(student, data, teacher=original, recipe=recipe, checkpoints=place, progress=bars("train student"))
