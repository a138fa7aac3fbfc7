"""The numbers of a training run: a recipe that works, as a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fxmerge.core.options import require_number, require_whole
from fxmerge.errors import InputError
from fxmerge.measure.digests import function_name
from fxmerge.measure.labelled import check_labels
from fxmerge.tune.distillation import Distillation


def top1(outputs: Tensor, labels: Tensor) -> Tensor:
    """1 for every image (or pixel) of whose logits (N, classes, ...) the largest is its label (N, ...), else 0; (N, ...).

    Raises:
        ValueError: labels of another shape, which would be compared each with each, or of classes that there are not.
    """
    check_labels(labels, outputs)
    return (outputs.argmax(1) == labels).float()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is trained: stochastic gradient descent along a cosine, with the weights averaged, the best kept.

    Args:
        epochs: how often to go through the data; 0 for none.
        learning_rate: the largest; it rises from 0 over the first steps, then falls to 0 along a cosine.
        warm_up: the fraction of all steps over which it rises.
        momentum: Nesterov's.
        weight_decay: of weights; norms and biases have none.
        clip: the norm that gradients are clipped to; None for no limit.
        average: the horizon of the exponential moving average of weights and statistics, as a fraction of all steps; 0 for none.
        loss: (outputs, labels) -> a mean over the batch.
        metric: (outputs, labels) -> a number for each image, (N,) or (N, ...); more is better, negate a loss.
        distillation: what the teacher counts for, where there is one.
        optimiser: parameters -> an optimiser, instead of the one above; its learning rates follow the same curve.
        checkpoint_steps: how often to write a checkpoint, beside at the end of every epoch; None for only then.
        seed: of everything random.

    Raises:
        InputError: a number out of range, or what is no function, or no Distillation, where one belongs.
    """

    epochs: int = 3
    learning_rate: float = 0.01
    warm_up: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float | None = 5.0
    average: float = 0.02
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    metric: Callable[[Any, Any], Tensor] = top1
    distillation: Distillation = field(default_factory=Distillation)
    optimiser: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    checkpoint_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("epochs", self.epochs, 0)
        require_number("learning_rate", self.learning_rate, "a positive number", lambda rate: 0 < rate < math.inf)
        for name in ("warm_up", "average"):
            require_number(name, getattr(self, name), "a fraction of all steps, from 0 to below 1", lambda share: 0 <= share < 1)
        for name in ("momentum", "weight_decay"):
            require_number(name, getattr(self, name), "a finite number from 0 on", lambda value: 0 <= value < math.inf)
        if self.clip is not None:
            require_number("clip", self.clip, "a positive number or None", lambda norm: norm > 0)
        if self.checkpoint_steps is not None:
            require_whole("checkpoint_steps", self.checkpoint_steps, 1)
        require_whole("seed", self.seed, 0, 2**32 - 1)
        if not isinstance(self.distillation, Distillation):
            raise InputError(
                f"distillation must be a Distillation, found {self.distillation!r:.80}; without a teacher there is none"
            )
        functions = {"loss": self.loss, "metric": self.metric, "optimiser": self.optimiser}
        for name, function in functions.items():
            if not callable(function) and not (name == "optimiser" and function is None):
                raise InputError(f"{name} must be a function, found {function!r:.80}")

    @property
    def settings(self) -> dict[str, str]:
        """All that decides what comes out; a run goes on only from a checkpoint with the same."""
        apart = ("distillation", "checkpoint_steps")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        values |= {f"distillation.{f.name}": getattr(self.distillation, f.name) for f in fields(self.distillation)}
        return {name: _named(value) if callable(value) else repr(value) for name, value in values.items()}

    def pace(self, step: int, steps: int) -> float:
        """The learning rate of a step, as a fraction of the largest."""
        rise = self.warm_up * steps
        return min(1.0, (step + 1) / (rise + 1)) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))

    def optimiser_for(self, network: nn.Module) -> Optimizer:
        """Of a network's parameters that are trained."""
        trained = [p for p in network.parameters() if p.requires_grad]
        if self.optimiser is not None:
            made = self.optimiser(trained)
            if not isinstance(made, Optimizer) or isinstance(made, torch.optim.LBFGS):
                raise InputError(
                    "optimiser must make, of parameters, an optimiser of torch's that steps on a gradient; it made "
                    f"{type(made).__name__}"
                )
            return made
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        some = [group for group in groups if group["params"]]
        return torch.optim.SGD(some, self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0)


def _named(function: Any) -> str:
    """A function's name; of one that has none to go by, no more than that it is one."""
    name = getattr(function, "__qualname__", "")
    return name if "<" in name else function_name(function)
