"""What a student is taught: the labels, the original's outputs, and the original's tensors at the cuts.

    loss = (1 - share) * labels  +  share * outputs  +  features * cuts

Outputs of shape (N, classes) are taken for logits: Hinton, Vinyals, Dean (2015), T^2 * KL(teacher / T || student / T). All others
count by their squared error over their squared size. Cuts are as in :mod:`fxmerge.tune.features` (Romero et al. 2015 without a
regressor: student and original have the same tensors there).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.core.options import require_number
from fxmerge.graph.meta import origin
from fxmerge.graph.query import fingerprint
from fxmerge.measure.divergence import divergence
from fxmerge.measure.labelled import shapes
from fxmerge.operators import Operators
from fxmerge.tune.features import feature_loss, shared_cuts, with_features
from fxmerge.tune.misfits import cannot_compare, cannot_take, require_mean, told


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How much of the loss is the teacher's.

    Args:
        share: the part of the loss that the teacher's outputs have, 0..1; the labels have the rest. Without labels it is 1.
        temperature: by which logits are divided for the teacher's part.
        features: the weight of the tensors at the cuts, where the teacher is the graph that the student was made from.
        match: (student's outputs, teacher's outputs) -> a mean over the batch; None for what the module's docstring says.

    Raises:
        InputError: a number out of range.
    """

    share: float = 0.9
    temperature: float = 4.0
    features: float = 1.0
    match: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        require_number("share", self.share, "a fraction from 0 to 1", lambda share: 0 <= share <= 1)
        require_number("temperature", self.temperature, "a positive number", lambda value: 0 < value < math.inf)
        require_number("features", self.features, "a finite number from 0 on", lambda value: 0 <= value < math.inf)

    def outputs(self, found: Any, wanted: Any) -> Tensor:
        """How far the student's outputs are from the teacher's; a scalar. InputError where ``match`` gives no such thing."""
        if self.match is not None:
            return require_mean(self.match(found, wanted), "match")
        if isinstance(wanted, Tensor) and wanted.dim() == 2 and wanted.shape[1] > 1:
            student, teacher = (F.log_softmax(_wide(logits) / self.temperature, 1) for logits in (found, wanted))
            return self.temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        return divergence(wanted, found).mean()


@dataclass(frozen=True, eq=False)
class Lesson:
    """A student that is made to give its tensors at the cuts, a teacher alike, and the loss of a batch.

    Args:
        student: to be called with a network's inputs; gives (outputs, features). Shares its modules with the student given.
        teacher: alike; None where labels alone teach.
        loss: (outputs, labels) -> a mean over the batch.
    """

    student: GraphModule
    teacher: nn.Module | None
    distillation: Distillation
    loss: Callable[[Any, Any], Tensor]

    @classmethod
    def of(
        cls,
        student: GraphModule,
        teacher: nn.Module | None,
        distillation: Distillation,
        loss: Callable[[Any, Any], Tensor],
        operators: Operators | None = None,
    ) -> Lesson:
        """Features are taken where the teacher is the very graph that the student was made from."""
        cuts: tuple[str, ...] = ()
        made_from = origin(student)
        if (
            distillation.features
            and isinstance(teacher, GraphModule)
            and made_from is not None
            and made_from == fingerprint(teacher)
        ):
            cuts = shared_cuts(student, teacher, operators=operators)
        taught: nn.Module | None = None
        if teacher is not None:
            own = copy.deepcopy(teacher).eval().requires_grad_(False)
            taught = with_features(own, cuts) if isinstance(own, GraphModule) else _Bare(own)
        return cls(with_features(student, cuts), taught, distillation, loss)

    def loss_of(self, student: Callable[..., Any], inputs: tuple[Any, ...], labels: Any) -> Tensor:
        """Of one batch; ``student`` is what :attr:`student` became by being prepared for the device.

        Raises:
            InputError: inputs, labels, networks and loss do not fit each other.
        """
        with told(lambda: cannot_take("student", self.student, inputs)):
            outputs, features = student(*inputs)
        if self.teacher is None:
            return self._labelled(outputs, labels)
        with torch.no_grad(), told(lambda: cannot_take("teacher", self.teacher, inputs)):
            wanted, targets = self.teacher(*inputs)
        share = self.distillation.share if labels is not None else 1.0
        with told(lambda: f"outputs of the student, {shapes(outputs)}, and of the teacher, {shapes(wanted)}, cannot be compared"):
            loss = share * self.distillation.outputs(outputs, wanted)
        if share < 1:
            loss = loss + (1 - share) * self._labelled(outputs, labels)
        if features:
            loss = loss + self.distillation.features * feature_loss(features, targets)
        return loss

    def _labelled(self, outputs: Any, labels: Any) -> Tensor:
        with told(lambda: cannot_compare("loss", outputs, labels)):
            loss = self.loss(outputs, labels)
        return require_mean(loss)


class _Bare(nn.Module):
    """A network of any kind as a teacher without features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        return self.network(*inputs), ()


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
