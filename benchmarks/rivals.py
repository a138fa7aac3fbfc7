"""Baselines that keep the depth: channels pruned by Torch-Pruning, the architecture made narrower; to a measured latency."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxmerge
from benchmarks.networks import Block

IMPORTANCES = ("magnitude", "norms", "taylor")


class TooSlow(LookupError):
    """None of the networks that were tried is fast enough; carries the fastest speed-up."""

    def __init__(self, message: str, fastest: float) -> None:
        super().__init__(message)
        self.fastest = fastest


@dataclass(frozen=True, eq=False)
class Near:
    """A network as large as a latency allows.

    Args:
        number: what it was made from.
        graph: traced, norms not folded; in eval mode.
        measured: the folded original, and it with its norms folded, timed in turn.
    """

    number: float
    graph: GraphModule
    measured: tuple[fxmerge.Measurement, fxmerge.Measurement]

    @property
    def speedup(self) -> float:
        return self.measured[0].median_ns / self.measured[1].median_ns


def nearest(
    build: Callable[[float], nn.Module],
    original: GraphModule,
    example: Tensor,
    speedup: float,
    timer: Callable[..., Any],
    *,
    tolerance: float = 0.03,
    tries: int = 10,
) -> Near:
    """The largest network whose measured latency meets a speed-up, by bisection on a number in 0..1.

    As in fxmerge's own search, a network may be over the budget by the tolerance, and the search ends when one is within it.
    Latency is no smooth function of width: networks of which a wider one was seen to be as fast are never taken.

    Args:
        build: from a number, 1 for the original's size, to a network; a smaller number gives a smaller network.
        original: with its norms folded.
        example: images to time with.
        speedup: asked for, against the original.
        timer: as :func:`fxmerge.compare`.
        tolerance: how far over the budget it may be, as a fraction.
        tries: networks to time at most.

    Raises:
        TooSlow: none that was tried meets the speed-up.
    """
    low, high = 0.0, 1.0
    kept: Near | None = None
    fastest = 0.0
    for _ in range(tries):
        number = (low + high) / 2
        graph = fxmerge.trace(build(number).eval(), example)
        timed = [fxmerge.Timed(network, (example,)) for network in (original, fxmerge.baseline(graph))]
        found = Near(number, graph, tuple(timer(timed, target=fxmerge.Target())))
        over = speedup / found.speedup
        fastest = max(fastest, found.speedup)
        if over <= 1 + tolerance:
            kept = found if kept is None or number > kept.number else kept
            low = number
        else:
            high = number
        if 1 - tolerance <= over <= 1 + tolerance:
            break
    if kept is None:
        raise TooSlow(f"none of {tries} networks is {speedup:.2f} times as fast as the original", fastest)
    return kept


def prunable(network: nn.Module) -> nn.Module:
    """A copy that Torch-Pruning can follow: shortcuts that slice and pad become the 1x1 convolutions that do the same."""
    twin = copy.deepcopy(network)
    for block in twin.modules():
        if isinstance(block, Block) and block.stride != 1 and block.shortcut is None:
            width, width_in = block.conv1.out_channels, block.conv1.in_channels
            block.shortcut = nn.Conv2d(width_in, width, 1, block.stride, bias=False)
            before = block.more // 2
            with torch.no_grad():
                block.shortcut.weight.zero_()
                block.shortcut.weight[before : before + width_in, :, 0, 0] = torch.eye(width_in)
    return twin


def pruned(
    network: nn.Module, kept: float, example: Tensor, labelled: tuple[Tensor, Tensor], importance: str = "taylor", round_to: int = 1
) -> nn.Module:
    """The network with fewer channels, the least important gone, wherever they are; by Torch-Pruning.

    Args:
        network: not changed.
        kept: the fraction of channels to keep.
        example: images to follow the channels with.
        labelled: (images, labels) that ``taylor`` takes its gradients from.
        importance: ``magnitude`` of weights, the scales of ``norms``, or ``taylor``, of the loss; of whole groups of layers.
        round_to: channels of a layer become a multiple of this.
    """
    import torch_pruning as tp

    twin = prunable(network).eval()
    kinds = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "norms": lambda: tp.importance.BNScaleImportance(),
        "taylor": lambda: tp.importance.GroupTaylorImportance(),
    }
    classifiers = [module for module in twin.modules() if isinstance(module, nn.Linear)]
    pruner = tp.pruner.BasePruner(
        twin,
        example[:1],
        importance=kinds[importance](),
        global_pruning=True,
        pruning_ratio=1 - kept,
        max_pruning_ratio=0.9,
        ignored_layers=classifiers,
        round_to=round_to if round_to > 1 else None,
    )
    if importance == "taylor":
        with torch.enable_grad():
            nn.functional.cross_entropy(twin(labelled[0]), labelled[1]).backward()
    pruner.step()
    twin.zero_grad(set_to_none=True)
    return twin


def with_statistics(graph: GraphModule, images: Tensor) -> GraphModule:
    """A copy whose batch norms have the statistics of these images: what needs neither labels nor training."""
    twin = copy.deepcopy(graph).train()
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        for part in images.split(256):
            twin(part)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return twin.eval()
