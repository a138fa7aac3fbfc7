"""Weights of a network that come with no data set, trained here once: the recipe is committed, what it gives is cached."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxmerge
from benchmarks.batches import Augmented
from benchmarks.networks import cache, made
from fxmerge.tune import Epoch, Recipe, fine_tune


def recipe(epochs: int) -> Recipe:
    """Stochastic gradient descent along a cosine, no teacher."""
    return Recipe(epochs=epochs, learning_rate=0.1, warm_up=0.05, weight_decay=5e-4, average=0.02, checkpoint_steps=100)


def trained_here(
    name: str, pixels: Tensor, labels: Tensor, epochs: int, batch: int = 128, report: Callable[[Epoch], None] | None = None
) -> nn.Module:
    """A network of :func:`benchmarks.networks.made`, trained from scratch; taken from the cache where it was before.

    Interrupted, it goes on at the last epoch, or the last 100 steps, that was written.

    Args:
        name: of the architecture.
        pixels, labels: to train on, bytes.
        epochs: how often to go through them.
        batch: images in one.
        report: called after every epoch.
    """
    torch.manual_seed(0)
    network = made(name)
    file = cache() / f"{name}-cifar10-jpeg-{epochs}-epochs-{len(labels)}-images.safetensors"
    if not file.exists():
        graph = fxmerge.trace(network.eval(), torch.zeros(2, *pixels.shape[1:])).to(memory_format=torch.channels_last)
        numbers = recipe(epochs)
        run = file.with_suffix(".run")
        trained = fine_tune(graph, Augmented(pixels, labels, batch), recipe=numbers, checkpoints=run, report=report)
        save(trained.state_dict(), file)
        for path in run.iterdir():
            path.unlink()
        run.rmdir()
    network.load_state_dict(load_file(file))
    return network.eval()


def save(state: dict[str, Tensor], file: Path) -> None:
    """Whole or not at all."""
    scratch = file.with_suffix(f".{os.getpid()}.part")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, scratch)
    scratch.replace(file)
