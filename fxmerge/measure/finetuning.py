"""Scorers that build the network with one candidate taken and look at it whole: the published one, and anybody's.

The published importance (LayerMerge, ICML 2024; Kim et al. 2023) replaces one segment, fine-tunes the whole network and takes the
change of the quality on held-out data,

    importance = exp(quality after - quality of the original)

Here a score is the loss, minus that change, negative where the network gets better; ``objective="layermerge"`` of the solver takes
the exponential of the change, sums of losses count what is negative as 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from fxmerge.analysis.segments import Findings
from fxmerge.core.options import require_number, require_whole
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.core.table import Importance, bounded
from fxmerge.errors import InputError
from fxmerge.measure.calibration import Batch, images_in
from fxmerge.measure.digests import data_digest, function_name
from fxmerge.measure.labelled import Labelled, arguments, check_labels, labelled, shapes, short
from fxmerge.measure.reconstruction import Reconstruction
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import linearize


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The published scorer: each candidate alone in the network, which is then fine-tuned for some steps.

    Args:
        train: labelled batches, gone through again and again; read once and kept.
        holdout: labelled batches that quality is measured on; read once and kept.
        steps: of stochastic gradient descent, one batch each; 0 for none.
        learning_rate, momentum, weight_decay: of it.
        metric: ``accuracy``, the part of the hold-out (of its pixels, where labels have such) that is right, or ``loss``.
        loss: (outputs, labels) -> a mean over the batch, of both training and metric.
        fit: what weights fitted candidates start from.
        seed: of whatever is random in training (dropout).

    In a store its scores are kept under all of these: of the data the values, of ``loss`` the name where it has one (module and
    qualified name: write another body under the same name, and scores of the old one are still taken; name it anew, or give
    another store), all its attributes where it is an object, nothing lasting where it is a lambda.

    Raises:
        InputError: no labelled batches, or a number out of range; and, when scores are asked for, data that does not fit the
            network.
    """

    train: Iterable[Labelled]
    holdout: Iterable[Labelled]
    steps: int = 100
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    metric: Literal["accuracy", "loss"] = "accuracy"
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    fit: Reconstruction = field(default_factory=Reconstruction)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "holdout"):
            object.__setattr__(self, name, labelled(name, getattr(self, name)))
        require_whole("steps", self.steps, 0)
        if self.metric not in ("accuracy", "loss"):
            raise InputError(f"metric must be accuracy or loss, found {self.metric!r:.80}")
        for name in ("learning_rate", "momentum", "weight_decay"):
            require_number(name, getattr(self, name), "a finite number from 0 on", lambda value: 0 <= value < math.inf)
        if not self.holdout or (self.steps and not self.train):
            raise InputError("fine-tuning needs batches to train on and a hold-out; found none of the one or the other")

    @property
    def settings(self) -> str:
        numbers = [
            f"{name}={getattr(self, name)!r}" for name in ("steps", "learning_rate", "momentum", "weight_decay", "metric", "seed")
        ]
        data = f"train={data_digest(self.train)} holdout={data_digest(self.holdout)}"
        loss = function_name(self.loss)
        return f"fine-tuning {' '.join(numbers)} loss={loss} {data} fit=({self.fit.settings})"

    def tasks(self, findings: Findings, proposals: Sequence[Proposal], at_least: int) -> Sequence[Sequence[Proposal]]:
        """Every candidate by itself."""
        return _one_by_one(proposals)

    def prepare(self, findings: Findings, batches: Sequence[Batch]) -> Callable[[Sequence[Proposal]], dict[str, Importance]]:
        """What scores candidates; the quality of the original is measured here, once."""
        with torch.inference_mode(False):
            try:
                before = self._quality(findings.graph)
            except Exception as fault:  # other people's network, data and loss
                raise InputError(f"the hold-out cannot be judged by {self.metric}: {short(fault)}") from fault

            def scoring(proposals: Sequence[Proposal]) -> dict[str, Importance]:
                return {c.id: self._score(findings, c, batches, before) for p in proposals for c in p.candidates}

        return scoring

    def _score(self, findings: Findings, candidate: Candidate, batches: Sequence[Batch], before: float) -> Importance:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            student = student_of(findings, candidate, batches, self.fit)
            self._train(student)
            after = self._quality(student)
        count = sum(images_in(arguments(inputs)) for inputs, _ in self.holdout)
        lost = before - after if self.metric == "accuracy" else after - before
        return Importance(bounded(lost), count, "fine-tuning")

    def _train(self, student: GraphModule) -> None:
        student.train()
        optimizer = torch.optim.SGD(
            student.parameters(), self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        for number, (inputs, labels) in itertools.islice(itertools.cycle(enumerate(self.train)), self.steps):
            optimizer.zero_grad()
            try:
                self.loss(student(*arguments(inputs)), labels).backward()
            except Exception as fault:  # other people's network, data and loss
                what = f"{shapes(inputs)}, labels {shapes(labels)}"
                raise InputError(f"batch {number} of train (inputs {what}) cannot be trained on: {short(fault)}") from fault
            optimizer.step()
        student.eval()

    @torch.no_grad()
    def _quality(self, network: GraphModule) -> float:
        total, count = 0.0, 0
        for inputs, labels in self.holdout:
            images = images_in(arguments(inputs))
            outputs = network(*arguments(inputs))
            if self.metric == "accuracy":
                check_labels(labels, outputs)
                total += (outputs.argmax(1) == labels).double().mean().item() * images
            else:
                total += self.loss(outputs, labels).item() * images
            count += images
        return total / count


@dataclass(frozen=True)
class Custom:
    """A scorer from a function of your own.

    In a store its scores are kept under its name and the settings of ``fit``, with the digests of network and data. The function is
    not looked at, neither its source nor what it reads: where it gives other numbers, give another name.

    Args:
        name: what its scores are kept under; two functions of one name are one scorer to a store.
        function: (original, merged network, calibration batches) -> loss, at least 0; both networks in eval mode. Weights were
            fitted to these batches; one that judges by images of its own judges more strictly. To go to other processes it must be
            one that pickle can send: a function of a module, not a lambda.
        fit: what weights fitted candidates get.
    """

    name: str
    function: Callable[[GraphModule, GraphModule, Sequence[Batch]], float]
    fit: Reconstruction = field(default_factory=Reconstruction)

    @property
    def settings(self) -> str:
        return f"custom {self.name} fit=({self.fit.settings})"

    def tasks(self, findings: Findings, proposals: Sequence[Proposal], at_least: int) -> Sequence[Sequence[Proposal]]:
        """Every candidate by itself."""
        return _one_by_one(proposals)

    def prepare(self, findings: Findings, batches: Sequence[Batch]) -> Callable[[Sequence[Proposal]], dict[str, Importance]]:
        """What scores candidates.

        Raises (when called):
            InputError: the function gives something else than a number from 0 on.
        """
        count = sum(map(images_in, batches))

        def scoring(proposals: Sequence[Proposal]) -> dict[str, Importance]:
            return {c.id: Importance(self._loss(findings, c, batches), count, self.name) for p in proposals for c in p.candidates}

        return scoring

    def _loss(self, findings: Findings, candidate: Candidate, batches: Sequence[Batch]) -> float:
        merged = fuse(student_of(findings, candidate, batches, self.fit), operators=findings.operators)
        loss = self.function(findings.graph, merged, batches)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            loss = float(loss)
        if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not 0 <= loss < float("inf"):
            raise InputError(f"the scorer {self.name!r} gave {loss!r} for {candidate.id}; expected a finite number from 0 on")
        return float(loss)


def student_of(findings: Findings, candidate: Candidate, batches: Sequence[Batch], fit: Reconstruction) -> GraphModule:
    """The student in which one candidate alone is taken, its weights fitted if it is to be; in eval mode."""
    plan = Plan(findings.fingerprint, (candidate,))
    weights = fit.alone().fit(findings, plan, batches) if candidate.kind == "fitted" or candidate.fixed else {}
    return linearize(annotate(findings.graph, plan), weights=weights, operators=findings.operators).eval()


def _one_by_one(proposals: Sequence[Proposal]) -> list[list[Proposal]]:
    return [[Proposal(proposal.segment, (candidate,))] for proposal in proposals for candidate in proposal.candidates]
