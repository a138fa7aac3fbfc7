"""The calibration-tuned regime: a few hundred gradient steps on unlabelled images, between closed form and training.

As block reconstruction does in post-training quantisation (Li et al. 2021, BRECQ), the student's tensors are brought back to the
original's; here at all cuts that exist in both at once, and the outputs with them:

    loss = mean over cuts of |s - t|^2 / var(t)  +  divergence of the outputs

Norms stay in eval mode: what is tuned is the function that will be merged. A step of Adam moves a weight by its step size whatever
the gradient, so the step size of each tensor is a fraction of the tensor's own size, and no layer can be thrown out of scale
because its weights are small (merged convolutions, with their norms folded in, differ by orders of magnitude). Adam's first steps
go the same way everywhere, and what they do to the output adds up over the layers; so the layers share the step size out. A part
of the images is held out and tells which state is best; where the student gets much worse, the best is taken up again at half the
pace.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.core.options import require_number, require_whole
from fxmerge.errors import CalibrationError, InputError
from fxmerge.measure.calibration import Batch, accepted, as_batches, images_in, in_parts, picked
from fxmerge.measure.divergence import divergence
from fxmerge.operators import Operators
from fxmerge.tune.features import feature_loss, require_graph, shared_cuts, with_features

log = logging.getLogger(__name__)

#: A state whose loss on the held-out images is so many times the best one's is left.
_WORSE = 1.5


def calibration_tune(
    student: GraphModule,
    original: GraphModule,
    batches: Any,
    *,
    steps: int = 400,
    batch_size: int = 64,
    step_size: float = 0.1,
    held_out: float = 0.125,
    limit: int = 1024,
    seed: int = 0,
    augment: Callable[[Batch, torch.Generator], Batch] | None = None,
    operators: Operators | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GraphModule:
    """Bring a student back to the original on unlabelled images, by gradient steps; minutes on a CPU.

    Args:
        student: from :func:`fxmerge.linearize`, with norms or without; it is not changed.
        original: the traced graph that the student's plan was made for, in eval mode.
        batches: what ``compress`` takes as calibration: a tensor (N, ...), or an iterable of inputs or (input, label) pairs.
        steps: of Adam.
        batch_size: images a step.
        step_size: the largest step of all layers together: of a weight, as a fraction of the root mean square of the tensor it is
            in, divided by the number of layers. It rises over the first tenth of the steps, then falls to 0 along a cosine.
        held_out: the fraction of the images that no step sees, and that tells which state is kept.
        limit: how many images to take, from the first; two at least.
        seed: of the order of the images.
        augment: (batch, generator) -> batch; both networks see what it gives.
        operators: what was known of operators when the plan was made; None for the default table.
        progress: called with (done, total) steps.

    Returns:
        A copy in eval mode: the best state by the held-out images, the student as it was given where none is better.

    Raises:
        PlanMismatchError: the student was not made from this graph.
        CalibrationError: the images cannot be used together, or are fewer than two.
        InputError: an option out of range, or a model where a traced graph belongs.
    """
    require_graph("student", student)
    require_graph("original", original)
    _check(steps, batch_size, step_size, held_out, limit)
    require_whole("seed", seed, 0, 2**63 - 1)
    with torch.inference_mode(False), torch.enable_grad():
        tuned = copy.deepcopy(student).eval()
        parameters = [p for p in tuned.parameters() if p.is_floating_point() and p.numel()]
        images = as_batches(batches, original, batch_size=limit, limit=limit)
        count = sum(map(images_in, images))
        if count < 2:
            raise CalibrationError("tuning needs two images at least: one to learn from, one to be judged by")
        if not steps or not parameters:
            return tuned
        if not any(p.requires_grad for p in parameters):
            raise InputError("no parameter of the student requires a gradient, so there is nothing to tune")
        pair = _Pair.of(tuned, original, operators)
        generator = torch.Generator().manual_seed(seed)
        learn, judge = _split(count, held_out, generator)
        judges = in_parts([picked(batch, original, index) for batch, index in _by_batch(images, judge)], original, batch_size)
        descent = _Descent(parameters, step_size)
        best = _Best(tuned, pair.judged(judges))
        started = best.loss
        for step, (whole, index) in enumerate(_orders(_by_batch(images, learn), batch_size, steps, generator)):
            batch = picked(whole, original, index)
            descent.step(pair.loss(_augmented(batch, augment, generator)), _pace(step, steps))
            if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
                best.judge(pair.judged(judges), descent)
            if progress is not None:
                progress(step + 1, steps)
        best.restore()
    log.info("calibration tuning: %.4g became %.4g on the %d images held out", started, best.loss, len(judge))
    return tuned


def _augmented(batch: Batch, augment: Callable[[Batch, torch.Generator], Batch] | None, generator: torch.Generator) -> Batch:
    changed = batch if augment is None else augment(batch, generator)
    if not isinstance(changed, tuple) or len(changed) != len(batch):
        raise InputError(f"augment must give a batch, a tuple of the {len(batch)} arguments it was given; gave {changed!r:.80}")
    return changed


@dataclass(frozen=True, eq=False)
class _Pair:
    """Student and original, both giving their tensors at the shared cuts too."""

    student: GraphModule
    original: GraphModule

    @classmethod
    def of(cls, student: GraphModule, original: GraphModule, operators: Operators | None) -> _Pair:
        cuts = shared_cuts(student, original, operators=operators)
        return cls(with_features(student, cuts), with_features(original, cuts))

    def loss(self, batch: Batch) -> Tensor:
        with accepted(batch):
            with torch.no_grad():
                wanted, targets = self.original(*batch)
            found, features = self.student(*batch)
        return feature_loss(features, targets) + divergence(wanted, found).mean()

    @torch.no_grad()
    def judged(self, batches: Sequence[Batch]) -> float:
        """The loss on the images held out; infinite where it is no number."""
        losses = [self.loss(batch).item() * images_in(batch) for batch in batches]
        total = sum(losses) / sum(map(images_in, batches))
        return total if math.isfinite(total) else math.inf


class _Descent:
    """Adam with a step size for each tensor, relative to its own size as it was at the start, shared out among the layers."""

    def __init__(self, parameters: Sequence[nn.Parameter], step_size: float) -> None:
        layers = max(1, sum(parameter.dim() > 1 for parameter in parameters))
        self.sizes = [step_size / layers * _size(parameter) for parameter in parameters]
        self.parameters, self.factor = parameters, 1.0
        self.start_afresh()

    def start_afresh(self) -> None:
        groups = [{"params": [p], "lr": 0.0} for p in self.parameters]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.99))

    def step(self, loss: Tensor, pace: float) -> None:
        for group, size in zip(self.adam.param_groups, self.sizes, strict=True):
            group["lr"] = size * pace * self.factor
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()


class _Best:
    """The best state so far, and what to do when the present one is much worse."""

    def __init__(self, student: GraphModule, loss: float) -> None:
        self.student, self.loss = student, loss
        self.state = self._copied()

    def _copied(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.student.named_parameters()}

    def judge(self, loss: float, descent: _Descent) -> None:
        if loss < self.loss:
            self.loss, self.state = loss, self._copied()
        elif loss > _WORSE * self.loss:
            log.info("the loss on the images held out rose from %.4g to %.4g: back to the best, at half the pace", self.loss, loss)
            self.restore()
            descent.factor /= 2
            descent.start_afresh()

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self.student.named_parameters():
            parameter.copy_(self.state[name])


def _size(parameter: Tensor) -> float:
    """Root mean square; of a tensor of zeros, one hundredth."""
    return float(parameter.detach().double().square().mean().sqrt()) or 0.01


def _split(count: int, held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of the images to learn from, and of those to be judged by; at least one each."""
    order = torch.randperm(count, generator=generator)
    judges = min(max(1, round(count * held_out)), count - 1)
    return order[judges:], order[:judges]


def _by_batch(batches: Sequence[Batch], numbers: Tensor) -> list[tuple[Batch, Tensor]]:
    """Images by their numbers in all batches together, as numbers in each batch that holds some of them."""
    found, first = [], 0
    for batch in batches:
        stop = first + images_in(batch)
        found.append((batch, numbers[(numbers >= first) & (numbers < stop)] - first))
        first = stop
    return [(batch, index) for batch, index in found if len(index)]


def _orders(
    images: Sequence[tuple[Batch, Tensor]], batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[tuple[Batch, Tensor]]:
    """A batch and numbers of its images for every step: epoch after epoch, each in a new order, incomplete steps left out."""
    done = 0
    while done < steps:
        turns = torch.randperm(len(images), generator=generator).tolist() if len(images) > 1 else [0]
        for batch, numbers in (images[turn] for turn in turns):
            size = min(batch_size, len(numbers))
            order = numbers[torch.randperm(len(numbers), generator=generator)]
            for index in order[: len(order) // size * size].split(size)[: steps - done]:
                done += 1
                yield batch, index


def _pace(step: int, steps: int) -> float:
    rise = max(1, steps // 10)
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _check(steps: int, batch_size: int, step_size: float, held_out: float, limit: int) -> None:
    for name, value, least in (("steps", steps, 0), ("batch_size", batch_size, 1), ("limit", limit, 2)):
        require_whole(name, value, least)
    require_number("step_size", step_size, "a positive number", lambda size: 0 < size < math.inf)
    require_number("held_out", held_out, "a fraction between 0 and 1", lambda share: 0 < share < 1)
