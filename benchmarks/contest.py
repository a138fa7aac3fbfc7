"""Networks compressed by each method to each speed-up, measured, and what is left of their accuracy, trained or not.

Two stages, each kept on disk. A *start* is a network compressed to a speed-up: found once, timed against the folded original, its
students saved. A *row* is one accuracy: of a start as it is, tuned on the calibration images, or trained, by one seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxmerge
from benchmarks.batches import Augmented, moved
from benchmarks.kept import Kept, otherwise
from benchmarks.networks import accuracy, made, normalised, pixels, pretrained
from benchmarks.pretraining import trained_here
from benchmarks.rivals import Near, TooSlow, nearest, pruned, with_statistics
from benchmarks.stages import timed
from fxmerge.budget import Budget
from fxmerge.core.files import write_json
from fxmerge.core.plan import Plan
from fxmerge.core.segment import narrowed
from fxmerge.measure.digests import data_digest, network_digest
from fxmerge.measure.divergence import divergence
from fxmerge.search import Search, build_networks
from fxmerge.survey import Survey
from fxmerge.trials import TRIALS, best_near
from fxmerge.tune import Distillation, Recipe, already_merged, calibrate_norms, calibration_tune, fine_tune

#: What measures; None for the clock, and for what the method says.
TIMER: fxmerge.Timer | None = None
SCORER: fxmerge.Scorer | None = None

TOLERANCE = 0.03
SCORER_BATCH, HOLD_OUT = 64, 1024


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a network is made faster.

    Args:
        label: for people.
        space: which candidates are offered; None where depth is kept.
        objective: what plans are ranked by.
        fitted: whether weights are fitted in closed form, and importance is measured so.
    """

    label: str
    space: Literal["joint", "composed", "activations", "layers"] | None = None
    objective: Literal["additive-loss", "layermerge"] = "additive-loss"
    fitted: bool = True


METHODS: Mapping[str, Method] = {
    "fxmerge": Method(label="fxmerge", space="joint"),
    "composed": Method(label="published candidates, our fit", space="composed"),
    "activations": Method(label="activations only, our fit", space="activations"),
    "layers": Method(label="layers only, our fit", space="layers"),
    "layermerge": Method(label="LayerMerge as published", space="composed", objective="layermerge", fitted=False),
    "channels": Method(label="channels pruned (Torch-Pruning)"),
    "narrower": Method(label="made narrower, from scratch"),
}
REGIMES = ("closed form", "tuned", "merged", "layers")


def regimes_of(method: str) -> tuple[str, ...]:
    """What can be made of a start: as it is, tuned, and trained: merged already, or layer by layer."""
    if METHODS[method].space is None:
        return ("merged",) if method == "narrower" else ("closed form", "merged")
    return REGIMES if METHODS[method].fitted else ("closed form", "merged", "layers")


@dataclass(frozen=True, eq=False)
class Start:
    """A compressed network, before any training.

    Args:
        folder: what it is kept in.
        about: what was measured: speedup, original_ms, ms, predicted, convolutions, parameters, merges; the number that it was made
            from; or nothing but the fastest speed-up that there is.
    """

    folder: Path
    about: Mapping[str, Any]

    @property
    def can(self) -> bool:
        return "fastest" not in self.about


class Contest:
    """One network, its data and tables, and all that is made of it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.name = options, folder, str(options.network)
        self.costs: dict[str, float] = {}
        self.train_pixels, self.train_labels = _some(pixels("train"), options.train_images)
        test_pixels, self.test_labels = _some(pixels("test"), options.test_images)
        self.test = normalised(test_pixels)
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(0))
        self.calibration = normalised(self.train_pixels[order[: options.images]])
        self.example = normalised(_repeated(test_pixels, options.latency_batch))
        self.network = pretrained(self.name) or trained_here(
            self.name, self.train_pixels, self.train_labels, options.pretrain_epochs, options.batch, report=say
        )
        with timed(self.costs, "trace"):
            self.graph = fxmerge.trace(self.network, self.example)
        with timed(self.costs, "find"):
            self.findings = fxmerge.find_segments(self.graph)
            self.proposals = fxmerge.propose(self.findings, fxmerge.Space(groups=tuple(options.groups)))
        self.original = fxmerge.baseline(self.graph)
        self._check_folder()
        self.kept = Kept(folder / f"{self.name}.rows.jsonl")

    def _check_folder(self) -> None:
        """What is kept there is of these weights, images and batch; else nothing of it can be used, and nothing is lost."""
        file = self.folder / f"{self.name}.about.json"
        now = {
            "weights": network_digest(self.graph),
            "calibration images": data_digest([self.calibration]),
            "batch of the latency table": self.options.latency_batch,
            "groups": sorted(self.options.groups),
        }
        if other := otherwise(file, now):
            raise SystemExit(f"{self.folder} holds what was found with other {', '.join(other)}; give another --tables")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, now)

    # --- the tables ---------------------------------------------------------------------------------------------------------

    @cached_property
    def store(self) -> fxmerge.Store:
        self.folder.mkdir(parents=True, exist_ok=True)
        return fxmerge.Store(self.folder / f"{self.name}.db")

    @cached_property
    def latency(self) -> fxmerge.LatencyTable:
        def measure() -> fxmerge.LatencyTable:
            return fxmerge.measure_latency(self.findings, self.proposals, (self.example,), timer=TIMER)

        table: fxmerge.LatencyTable = self._kept("latency", fxmerge.LatencyTable, measure)
        return table

    @cached_property
    def useful(self) -> tuple[fxmerge.Proposal, ...]:
        return fxmerge.worthwhile(self.proposals, self.latency, self.findings.region)

    @cached_property
    def importance(self) -> fxmerge.ImportanceTable:
        """Of all candidates, in closed form."""

        def measure() -> fxmerge.ImportanceTable:
            return fxmerge.measure_importance(
                self.findings, self.useful, self.calibration, scorer=SCORER, latency=self.latency, store=self.store
            )

        table: fxmerge.ImportanceTable = self._kept("importance", fxmerge.ImportanceTable, measure)
        return table

    @cached_property
    def published_importance(self) -> fxmerge.ImportanceTable:
        """Of the published candidates, by fine-tuning."""

        def measure() -> fxmerge.ImportanceTable:
            return fxmerge.measure_importance(
                self.findings,
                self.offered("composed"),
                self.calibration,
                scorer=SCORER or self.published_scorer(),
                store=self.store,
                objective="layermerge",
                progress=_every(20, "candidates fine-tuned"),
            )

        table: fxmerge.ImportanceTable = self._kept(f"fine-tuning-{self.options.scorer_steps}", fxmerge.ImportanceTable, measure)
        return table

    def published_scorer(self) -> fxmerge.FineTuning:
        steps = self.options.scorer_steps
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(1))
        held_out = min(HOLD_OUT, len(order) // 2)
        hold_out, train = order[:held_out], order[held_out : held_out + SCORER_BATCH * steps]

        def batches(index: Tensor) -> list[tuple[Tensor, Tensor]]:
            return [(normalised(self.train_pixels[part]), self.train_labels[part]) for part in index.split(SCORER_BATCH)]

        return fxmerge.FineTuning(train=batches(train), holdout=batches(hold_out), steps=steps)

    def _kept(self, what: str, kind: Any, measure: Callable[[], Any]) -> Any:
        """A table from the folder, or measured and left there."""
        file = self.folder / f"{self.name}.{what}.json"
        if file.exists():
            return kind.load(file)
        with timed(self.costs, f"measure {what}"):
            table = measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        table.save(file)
        return table

    def offered(self, space: Any) -> tuple[fxmerge.Proposal, ...]:
        """The useful candidates of a space."""
        if space == "joint":
            return self.useful
        ids = {c.id for p in fxmerge.propose(self.findings, fxmerge.Space.named(space)) for c in p.candidates}
        return narrowed(self.useful, lambda candidate: candidate.id in ids)

    def survey(self, method: Method) -> Survey:
        batches = fxmerge.as_batches(self.calibration, self.graph)
        table = self.importance if method.fitted else self.published_importance
        offered = self.offered(method.space)
        return Survey(self.name, self.findings, offered, batches, self.latency, table, (self.example,), fxmerge.Target())

    # --- starts -------------------------------------------------------------------------------------------------------------

    def start(self, method: str, asked: float) -> Start:
        """The network compressed to a speed-up; from the folder, or found now and left there."""
        folder = self.folder / self.name / f"{method}-{asked:g}"
        settings = self.start_settings(method)
        file = folder / "start.json"
        if file.exists() and (about := json.loads(file.read_text(encoding="utf-8")))["settings"] == settings:
            return Start(folder, about)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        find = self._merged if METHODS[method].space else self._as_deep
        about = find(method, asked, folder)
        write_json(file, about | {"settings": settings})  # last: what is interrupted is begun anew
        return Start(folder, about)

    def plan_of(self, start: Start) -> Plan:
        """What is merged in a start."""
        return fxmerge.load(start.folder / "closed form", self.network, self.example).plan

    def start_settings(self, method: str) -> str:
        """What decides a start, beside its speed-up."""
        options, parts = self.options, [f"{self.options.images} calibration images"]
        if not METHODS[method].fitted:
            parts.append(f"{options.scorer_steps} steps of {SCORER_BATCH} a candidate, {HOLD_OUT} held out")
        elif METHODS[method].space and options.trials != TRIALS:
            parts.append(f"{options.trials} plans tried")
        if method == "channels":
            parts.append(f"importance {options.importance}, rounded to {options.round_to}")
        return ", ".join([*parts, f"batch {options.latency_batch}"])

    def _merged(self, name: str, asked: float, folder: Path) -> dict[str, Any]:
        method = METHODS[name]
        search = Search(self.survey(method), TOLERANCE, TIMER, method.objective)
        try:
            with timed(self.costs, "solve and measure"):
                plan, measured = found = search.within(Budget(1 / asked), 4, _silent)
        except fxmerge.BudgetError as refusal:
            return {"fastest": refusal.asked_ns * asked / refusal.fastest_ns}
        weights: Mapping[str, Any] = {}
        if method.fitted:
            with timed(self.costs, "fit (several plans a start)"):
                plan, measured, weights = best_near(
                    search, found, Budget(1 / asked), fxmerge.Reconstruction(), _silent, trials=self.options.trials
                )
        student, merged = build_networks(self.findings, plan, weights)
        fxmerge.save_student(student, plan, self.example, folder / "closed form")
        one, its = already_merged(self.graph, plan, weights=weights)
        for kind, its_plan, its_weights in (("layers", plan, weights), ("merged", one, its)):
            trainable = fxmerge.linearize(fxmerge.annotate(self.graph, its_plan), weights=its_weights, norms=True)
            calibrate_norms(trainable, self.calibration)
            fxmerge.save_student(trainable, its_plan, self.example, folder / kind)
        predicted = search.front.original_ns / max(1, plan.latency_ns or 1)
        composed = sum(merge.kind == "composed" for merge in plan.merges)
        return _figures(merged, measured) | {"predicted": predicted, "merges": len(plan.merges), "composed": composed}

    def _as_deep(self, method: str, asked: float, folder: Path) -> dict[str, Any]:
        """Of channels rounded one way or the other, the network whose outputs are nearest to the original's."""
        tried = {step: self._nearest(method, step, asked) for step in (self.options.round_to if method == "channels" else [1])}
        found = {step: near for step, near in tried.items() if isinstance(near, Near)}
        if not found:
            return {"fastest": max(speedup for speedup in tried.values() if isinstance(speedup, float))}
        best = min(found, key=lambda step: self._distance(found[step].graph)) if len(found) > 1 else next(iter(found))
        kept = found[best]
        figures = _figures(fxmerge.baseline(kept.graph), kept.measured)
        return figures | {"number": kept.number, "round_to": best, "merges": 0, "composed": 0}

    def _nearest(self, method: str, round_to: int, asked: float) -> Near | float:
        """Or the fastest speed-up that there is."""
        try:
            with timed(self.costs, "bisect"):
                build, timer = self.builder(method, round_to), TIMER or fxmerge.compare
                return nearest(build, self.original, self.example, asked, timer, tolerance=TOLERANCE)
        except TooSlow as refusal:
            return refusal.fastest

    def _distance(self, graph: GraphModule) -> float:
        ready = with_statistics(graph, self.calibration)
        with torch.no_grad():
            parts = [divergence(self.graph(images), ready(images)) for images in self.calibration.split(256)]
        return float(torch.cat(parts).mean())

    def builder(self, method: str, round_to: int) -> Callable[[float], nn.Module]:
        """From the number of a start to its network."""
        if method == "narrower":
            return lambda number: made(self.name, number)
        some = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(2))[:256]  # they lie by classes
        labelled = normalised(self.train_pixels[some]), self.train_labels[some]
        importance = self.options.importance
        return lambda number: pruned(self.network, number, self.example, labelled, importance, round_to)

    # --- rows ---------------------------------------------------------------------------------------------------------------

    def key(self, method: str, asked: float, regime: str, seed: int) -> dict[str, Any]:
        """What a row is found by."""
        settings = [self.start_settings(method), f"{len(self.test_labels)} test images"]
        if regime == "tuned":
            settings.append(f"{self.options.steps} steps")
        if regime in ("merged", "layers"):
            settings.append(f"{len(self.train_labels)} images, batch {self.options.batch}, {told(self.recipe(method, 0))}")
        return {
            "network": self.name,
            "method": method,
            "asked": asked,
            "regime": regime,
            "seed": seed if regime in ("merged", "layers") else 0,
            "settings": "; ".join(settings),
        }

    def row(self, method: str, asked: float, regime: str, seed: int) -> dict[str, Any] | None:
        """One accuracy; kept. None for a student layer by layer where that is the one merged already: no merge is composed."""
        key = self.key(method, asked, regime, seed)
        there = self.kept.found(key)
        if there is not None:
            return there
        start = self.start(method, asked)
        if regime == "layers" and not start.about.get("composed"):
            return None
        row = key | {name: value for name, value in start.about.items() if name != "settings"}
        if start.can:
            begun = time.perf_counter()
            row["top1"] = accuracy(self.network_of(start, method, regime, seed), self.test, self.test_labels)
            row["seconds"] = round(time.perf_counter() - begun, 1)
        self.kept.add(row)
        return row

    def network_of(self, start: Start, method: str, regime: str, seed: int) -> GraphModule:
        """The network that is judged, folded or merged."""
        if METHODS[method].space is None:
            torch.manual_seed(seed)
            graph = fxmerge.trace(self.builder(method, start.about["round_to"])(start.about["number"]).eval(), self.example)
            ready = graph if method == "narrower" else with_statistics(graph, self.calibration)
            return fxmerge.baseline(ready if regime == "closed form" else self.trained(ready, start, method, regime, seed))
        student = fxmerge.load(start.folder / ("closed form" if regime == "tuned" else regime), self.network, self.example).student
        if regime == "tuned":
            steps = self.options.steps
            student = calibration_tune(student, self.graph, self.calibration, steps=steps, augment=shifted)
        elif regime != "closed form":
            student = self.trained(student, start, method, regime, seed)
        return fxmerge.fuse(student)

    def trained(self, student: GraphModule, start: Start, method: str, regime: str, seed: int) -> GraphModule:
        run = start.folder / f"run-{regime}-{seed}"
        trained = fine_tune(
            copy.deepcopy(student).to(memory_format=torch.channels_last),
            Augmented(self.train_pixels, self.train_labels, self.options.batch),
            teacher=copy.deepcopy(self.graph).to(memory_format=torch.channels_last),
            recipe=self.recipe(method, seed),
            checkpoints=run,
            report=say,
        )
        shutil.rmtree(run, ignore_errors=True)
        return trained

    def recipe(self, method: str, seed: int) -> Recipe:
        """One for all but for what starts from nothing, which gets a larger step."""
        options = self.options
        rate = options.scratch_learning_rate if method == "narrower" else options.learning_rate
        taught = Distillation(share=options.share, temperature=options.temperature, features=options.features)
        return Recipe(epochs=options.epochs, learning_rate=rate, distillation=taught, seed=seed, checkpoint_steps=100)

    def original_top1(self) -> float:
        key = {"network": self.name, "method": "original", "settings": f"{len(self.test_labels)} test images"}
        there = self.kept.found(key)
        if there is None:
            there = key | {"top1": accuracy(self.original, self.test, self.test_labels)}
            self.kept.add(there)
        return float(there["top1"])

    def close(self) -> None:
        if "store" in self.__dict__:
            self.store.close()


def told(recipe: Recipe) -> str:
    """A recipe's numbers, but for its seed."""
    return ", ".join(f"{name}={value}" for name, value in recipe.settings.items() if name != "seed")


def say(epoch: fxmerge.tune.Epoch) -> None:
    print(f"  {epoch.step} steps, {epoch.number} epochs: loss {epoch.loss}", flush=True)  # noqa: T201 - hours of work; how far it is


def _figures(network: GraphModule, measured: tuple[fxmerge.Measurement, fxmerge.Measurement]) -> dict[str, Any]:
    original, found = measured
    return {
        "speedup": original.median_ns / found.median_ns,
        "original_ms": original.median_ns / 1e6,
        "ms": found.median_ns / 1e6,
        "convolutions": sum(isinstance(module, nn.Conv2d) for module in network.modules()),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def _some(split: tuple[Tensor, Tensor], count: int | None) -> tuple[Tensor, Tensor]:
    """A part of a split, of all classes; or the whole."""
    images, labels = split
    if count is None or count >= len(labels):
        return images, labels
    index = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    return images[index], labels[index]


def _repeated(images: Tensor, count: int) -> Tensor:
    return images[torch.arange(count) % len(images)]


def shifted(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """The augmentation of calibration tuning: flips, and shifts of up to two pixels."""
    return (moved(batch[0], 2, generator),)


def _silent(done: int, total: int) -> None:
    return


def _every(count: int, what: str) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done % count == 0 or done == total:
            print(f"  {done} of {total} {what}", flush=True)  # noqa: T201

    return progress
