"""A student trained by a recipe, with the original as teacher: on one device or many, resumed where it was killed.

accelerate does what depends on the machine: devices, processes (``accelerate launch``), mixed precision. Students train in
anybody's loop as well; this is one that works.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxmerge.errors import InputError
from fxmerge.measure.digests import network_digest
from fxmerge.operators import Operators
from fxmerge.tune.checkpoints import Checkpoint, Epoch, Position, held, read_checkpoint, write_checkpoint
from fxmerge.tune.distillation import Lesson
from fxmerge.tune.features import require_graph
from fxmerge.tune.feed import Data, Feed
from fxmerge.tune.misfits import cannot_compare, cannot_take, found_in, told
from fxmerge.tune.randomness import random_numbers_put_back, random_state, seed_all, set_random_state
from fxmerge.tune.recipe import Recipe

log = logging.getLogger(__name__)

#: How many steps go by between looks at whether the loss is still a number: each look waits for the device.
_LOOK = 20


def fine_tune(
    student: GraphModule,
    data: Data,
    *,
    teacher: nn.Module | None = None,
    recipe: Recipe | None = None,
    validation: Data | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    operators: Operators | None = None,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[Epoch], None] | None = None,
) -> GraphModule:
    """Train a student, with the original as teacher; needs the extra ``train``.

    Args:
        student: from :func:`fxmerge.linearize`, layer by layer or already merged; it is not changed.
        data: a DataLoader, batches that can be gone through again, or a function from the number of an epoch, from 0, to its
            batches. A batch is a pair (inputs, labels); inputs is a tensor (N, ...) or the tuple of a network's arguments.
        teacher: the original. The traced graph that the student was made from teaches its tensors at the cuts as well, any other
            network its outputs alone; None trains on the labels alone.
        recipe: the numbers; None for :class:`Recipe`'s own.
        validation: batches alike. The student is judged on them as it was given and after every epoch, and the best is returned;
            without them the last.
        checkpoints: a folder. A run that was killed goes on from there, to the same bits, if it is called the same, and if what the
            data draws comes from the global generators, from the loader's own, or from the number of the epoch.
        accelerator: of accelerate, with mixed precision or what else it offers, but gradients of one batch a step; None for one as
            ``accelerate launch`` says.
        operators: what was known of operators when the plan was made; None for the default table.
        progress: called with (done, total) steps, by the first process.
        report: called after every epoch, by the first process.

    Returns:
        A trained copy, in eval mode, on the device of the student given. ``fxmerge.fuse`` merges it.

    Raises:
        InputError: the loss is no longer finite (lower the learning rate), student, teacher, data, loss or folder cannot be used
            or do not fit each other (says which batch, and what is wrong with it), or accelerate is missing or gathers gradients.
        PlanError: the checkpoint is damaged, or of another student, teacher (their weights count) or recipe.
    """
    recipe = recipe or Recipe()
    if not isinstance(recipe, Recipe):
        raise InputError(f"recipe must be a Recipe, found {type(recipe).__name__}")
    require_graph("student", student)
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise InputError(f"the teacher must be a network or None, found {type(teacher).__name__}")
    if checkpoints is not None:
        _make(Path(checkpoints))
    if teacher is student:
        raise InputError("the teacher is the student itself; give the original")
    if not recipe.epochs:
        return copy.deepcopy(student).eval()
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise InputError("no parameter of the student requires a gradient, so there is nothing to train")
    accelerator = accelerator or _accelerator()
    if not hasattr(accelerator, "gradient_accumulation_steps"):
        raise InputError(f"accelerator must be an Accelerator of accelerate's, found {accelerator!r:.80}")
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"the accelerator gathers gradients over {accelerator.gradient_accumulation_steps} batches, and every step here is of "
            "one: give larger batches in place of gradient_accumulation_steps"
        )
    with random_numbers_put_back(accelerator.device), torch.inference_mode(False), torch.enable_grad():
        run = _Run(student, data, teacher, recipe, validation, accelerator, operators)
        run.folder = None if checkpoints is None else Path(checkpoints)
        run.progress, run.report = progress, report
        run.start()
        while run.position.epoch < recipe.epochs:
            run.one_epoch()
        return run.result(student)


def _make(folder: Path) -> None:
    """So that no epoch is trained for a folder that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as fault:
        raise InputError(f"checkpoints must be a folder that can be written, and {folder} is none: {fault}") from fault


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as fault:
        raise InputError("training needs accelerate: pip install 'fxmerge[train]'") from fault
    return Accelerator()


class _Run:
    """All that changes while a student is trained."""

    folder: Path | None = None
    progress: Callable[[int, int], None] | None = None
    report: Callable[[Epoch], None] | None = None

    def __init__(
        self,
        student: GraphModule,
        data: Data,
        teacher: nn.Module | None,
        recipe: Recipe,
        validation: Data | None,
        accelerator: Any,
        operators: Operators | None,
    ) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.student = copy.deepcopy(student).to(accelerator.device).train()
        self.feed = Feed(data, accelerator, recipe.seed)
        self.validation = None if validation is None else Feed(validation, accelerator, recipe.seed)
        self.steps = self.feed.steps()
        if not self.steps:
            raise InputError("data gives no batches (or fewer than there are processes), so nothing can be trained")
        self.total = self.steps * recipe.epochs
        self.lesson = Lesson.of(self.student, teacher, recipe.distillation, recipe.loss, operators)
        if self.lesson.teacher is not None:
            self.lesson.teacher.to(accelerator.device)
        optimiser = recipe.optimiser_for(self.student)
        self.largest = [group["lr"] for group in optimiser.param_groups]
        self.prepared, self.optimiser = accelerator.prepare(self.lesson.student, optimiser)
        self.average = self._averaged()
        self.best: dict[str, Tensor] | None = None
        self.position = Position()
        self.settings = recipe.settings | {
            "student": network_digest(student),
            "teacher": "none" if teacher is None else network_digest(teacher),
            "validation": "none" if validation is None else "given",
            "steps": str(self.total),
            "processes": str(accelerator.num_processes),
            "optimiser_class": type(optimiser).__name__,
            "optimiser_numbers": str([{k: v for k, v in group.items() if k != "params"} for group in optimiser.param_groups]),
        }

    def _averaged(self) -> AveragedModel | None:
        if not self.recipe.average:
            return None
        decay = 1 - 1 / max(1.0, self.recipe.average * self.total)
        return AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @property
    def judged(self) -> nn.Module:
        """What is validated and returned: the average, where there is one."""
        return self.student if self.average is None else self.average.module

    def start(self) -> None:
        """Go on from the checkpoint, or from the student as it was given."""
        seed_all(self.recipe.seed + int(self.accelerator.process_index))
        found = None if self.folder is None else read_checkpoint(self.folder, self.settings)
        if found is not None:
            self._resume(found)
        elif self.validation is not None:
            self._judge(None)

    def one_epoch(self) -> None:
        """The rest of an epoch, from wherever the run is."""
        self.prepared.train()
        epoch = self.position.epoch
        losses: Tensor = torch.zeros((), device=self.accelerator.device)
        count = 0
        for inputs, labels in self.feed.epoch(epoch, skip=self.position.batch):
            if self.position.batch == self.steps:
                break
            with found_in(lambda: f"batch {self.position.batch} of epoch {epoch + 1} cannot be trained on"):
                losses = losses + self._step(inputs, labels)
            count += 1
            self.position = self.position.next_step()
            every = self.recipe.checkpoint_steps
            due = every is not None and self.position.step % every == 0 and self.position.batch < self.steps
            if due or self.position.step % _LOOK == 0 or self.position.batch == self.steps:
                self._check_finite(losses)
            if due:
                self._write()
            if self.progress is not None and self.accelerator.is_main_process:
                self.progress(self.position.step, self.total)
        if self.position.batch < self.steps:
            raise InputError(f"epoch {epoch + 1} gave {self.position.batch} batches, the first was counted at {self.steps}")
        self.position = replace(self.position, epoch=epoch + 1, batch=0)
        self._agree()
        self._judge(float(self.accelerator.reduce(losses, reduction="mean")) / max(1, count))
        self._write()

    @torch.no_grad()
    def _agree(self) -> None:
        """Statistics that every process took of its own batches in the last step become those of the first, in averages, too."""
        if self.accelerator.num_processes == 1:
            return
        from accelerate.utils import broadcast

        for network in dict.fromkeys((self.student, self.judged)):  # in one order everywhere, for each waits for its like
            for buffer in network.buffers():
                buffer.copy_(broadcast(buffer))

    def _step(self, inputs: tuple[Any, ...], labels: Any) -> Tensor:
        pace = self.recipe.pace(self.position.step, self.total)
        for group, largest in zip(self.optimiser.param_groups, self.largest, strict=True):
            group["lr"] = largest * pace
        with self.accelerator.autocast():
            loss = self.lesson.loss_of(self.prepared, inputs, labels)
        self.optimiser.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if self.recipe.clip is not None:
            self.accelerator.clip_grad_norm_(self.student.parameters(), self.recipe.clip)
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.student)
        return loss.detach().float()

    def _check_finite(self, losses: Tensor) -> None:
        total = self.accelerator.reduce(losses.clone(), reduction="sum")
        if not bool(torch.isfinite(total)):
            raise InputError(
                f"the loss is no longer finite after {self.position.step} steps; lower learning_rate (it is "
                f"{self.recipe.learning_rate}), if no batch is empty or has labels that none counts of"
            )

    @torch.no_grad()
    def _judge(self, loss: float | None) -> None:
        """Validate, note, keep the best."""
        metric = None if self.validation is None else self._metric(self.validation)
        best = self.position.best
        if metric is not None and not math.isnan(metric) and (best is None or metric > best):
            self.best = {name: tensor.detach().clone() for name, tensor in held(self.judged).items()}
            best = metric
        epoch = Epoch(self.position.epoch, self.position.step, loss, metric)
        self.position = replace(self.position, best=best, history=(*self.position.history, epoch))
        log.info("epoch %d of %d: loss %s, metric %s", epoch.number, self.recipe.epochs, epoch.loss, epoch.metric)
        if self.report is not None and self.accelerator.is_main_process:
            self.report(epoch)

    def _metric(self, validation: Feed) -> float:
        network = self.judged.eval()
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        for number, (inputs, labels) in enumerate(validation.whole()):
            with found_in(lambda: f"batch {number} of validation cannot be judged"), self.accelerator.autocast():  # noqa: B023
                values = self._judged_batch(network, inputs, labels)
            if validation.prepared:
                values = self.accelerator.gather_for_metrics(values)
            sums += torch.tensor([float(values.double().sum()), values.numel()], dtype=torch.float64)
        if not validation.prepared:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu()
        self.student.train()
        if not sums[1]:
            raise InputError("validation gives no batches")
        return float(sums[0] / sums[1])

    def _judged_batch(self, network: nn.Module, inputs: tuple[Any, ...], labels: Any) -> Tensor:
        with told(lambda: cannot_take("student", network, inputs)):
            outputs = network(*inputs)
        with told(lambda: cannot_compare("metric", outputs, labels)):
            values = self.recipe.metric(outputs, labels)
        if not isinstance(values, Tensor):
            raise InputError(f"metric must give a tensor with a number for each image, found {type(values).__name__}")
        return values

    def _write(self) -> None:
        if self.folder is None:
            return
        from accelerate.utils import gather_object

        random = gather_object([random_state(self.accelerator.device)])
        if self.accelerator.is_main_process:
            networks = {"student": held(self.student)}
            if self.average is not None:
                networks["average"] = held(self.average)
            if self.best is not None:
                networks["best"] = self.best
            scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
            about = {"random": random, "settings": self.settings, "scaler": scaler}
            write_checkpoint(self.folder, networks, self.optimiser.optimizer, self.position, about)
        self.accelerator.wait_for_everyone()

    def _resume(self, found: Checkpoint) -> None:
        found.fill("student", held(self.student))
        if self.average is not None:
            found.fill("average", held(self.average))
        if found.has("best"):
            self.best = {name: tensor.detach().clone() for name, tensor in held(self.judged).items()}
            found.fill("best", self.best)
        found.fill_optimiser(self.optimiser.optimizer)
        if self.accelerator.scaler is not None and found.about["scaler"]:
            self.accelerator.scaler.load_state_dict(found.about["scaler"])
        set_random_state(found.about["random"][self.accelerator.process_index], self.accelerator.device)
        self.position = found.position
        log.info("going on from %s: %d of %d steps are done", found.path, self.position.step, self.total)

    def result(self, student: GraphModule) -> GraphModule:
        """A copy of the student given, with the best tensors, or the last."""
        trained = copy.deepcopy(student).eval()
        final = self.best if self.best is not None else held(self.judged)
        with torch.no_grad():
            for name, tensor in held(trained).items():
                tensor.copy_(final[name])
        self.accelerator.free_memory(self.prepared, self.optimiser)
        return trained
