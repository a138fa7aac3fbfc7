"""Accuracy without training, and measured latency, of CIFAR ResNets at given speed-ups: fitted, composed, baselines.

    python -m benchmarks.cifar10 --network resnet20
    python -m benchmarks.cifar10 --network resnet20 --ablation

Two figures without training: weights in closed form, and those then tuned on the same unlabelled images. The ablation takes the
plan that the tables give for each speed-up and adds one part of the fit after the other; nothing is timed for it.

Needs ../shared (or FXMERGE_DATA and FXMERGE_WEIGHTS). Latencies are of batch 128 on this machine's CPU, both sides timed in turn in
one process, against the original with its batch norms folded; accuracy is on all 10,000 test images of the JPEG copy.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.fx import GraphModule

import fxmerge
from benchmarks.networks import accuracy, cifar10, cifar_resnet
from benchmarks.reports import deliver
from benchmarks.stages import timed
from fxmerge.core.segment import narrowed
from fxmerge.search import Search, build_networks
from fxmerge.survey import Survey

SPACES = {
    "fitted (ours)": "joint",
    "composed": "composed",
    "activations only": "activations",
    "layers only": "layers",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--images", type=int, default=1024, help="calibration images, unlabelled, from the training split")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.1, 1.2, 1.3, 1.5, 2.0])
    parser.add_argument("--steps", type=int, default=400, help="gradient steps of calibration tuning; 0 leaves it out")
    parser.add_argument("--ours", action="store_true", help="leave the baselines out")
    parser.add_argument("--ablation", action="store_true", help="take the fit apart instead")
    parser.add_argument("--tables", type=Path, help="a folder to keep the two tables in, or to take them from")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    deliver(run(options), options.out)


def run(options: argparse.Namespace) -> str:
    """The whole benchmark as one Markdown text."""
    name, images, speedups = options.network, options.images, options.speedups
    network = cifar_resnet(name)
    test_x, test_y = cifar10("test")
    train_x, _ = cifar10("train")
    calibration = train_x[torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0))[:images]]
    example = test_x[:128]
    costs: dict[str, float] = {}
    with timed(costs, "trace"):
        graph = fxmerge.trace(network, example)
    with timed(costs, "find"):
        findings = fxmerge.find_segments(graph)
        proposals = fxmerge.propose(findings)

    def measured_latency() -> fxmerge.LatencyTable:
        return fxmerge.measure_latency(findings, proposals, (example,))

    latency = _kept(options.tables, f"{name}.latency.json", fxmerge.LatencyTable, costs, measured_latency)
    useful = fxmerge.worthwhile(proposals, latency, findings.region)
    importance = _kept(
        options.tables,
        f"{name}.importance.json",
        fxmerge.ImportanceTable,
        costs,
        lambda: fxmerge.measure_importance(findings, useful, calibration, latency=latency),
    )
    batches = fxmerge.as_batches(calibration, graph)
    found = Survey(name, findings, useful, batches, latency, importance, (example,), fxmerge.Target())
    if options.ablation:
        return f"{_title(options)}\n\n{ablation(found, calibration, options, lambda network: accuracy(network, test_x, test_y))}"
    rows: list[tuple[object, ...]] = [
        ("original, folded", "1.00", "1.00", "1.00", f"{accuracy(network, test_x, test_y):.2f}", "", "", "")
    ]
    tuning = Tuning(calibration, options.steps, costs)
    for label, space in list(SPACES.items())[: 1 if options.ours else None]:
        offered = {c.id for p in fxmerge.propose(findings, fxmerge.Space.named(space)) for c in p.candidates}
        some = narrowed(useful, lambda candidate, offered=offered: candidate.id in offered)  # type: ignore[misc]
        search = Search(replace(found, proposals=some), 0.03)
        for speedup in speedups:
            rows.append(_row(label, speedup, search, test_x, test_y, tuning))
            print(*rows[-1], flush=True)  # noqa: T201 - an hour's work; say how far it is
    heads = ("candidates", "asked", "predicted", "measured", "closed form", "calibration-tuned", "convolutions", "merges")
    return "\n\n".join((_title(options), tabulate(rows, heads, "github", disable_numparse=True), _costs(costs, latency, useful)))


def _row(label: str, speedup: float, search: Search, test_x: Tensor, test_y: Tensor, tuning: Tuning) -> tuple[object, ...]:
    costs = tuning.costs
    with timed(costs, "solve"):
        assert len(search.front)
    try:
        found = search.within(1 / speedup, None, 4, lambda done, total: None)
    except fxmerge.BudgetError as refusal:
        fastest = search.measure(search.front.plan(0))
        return label, f"{speedup:.2f}", "", f"cannot; fastest {fastest[0].median_ns / refusal.fastest_ns:.2f}", "", "", "", ""
    with timed(costs, "fit (several plans a row)"):
        plan, measured, weights = search.best_near(found, 1 / speedup, None, fxmerge.Reconstruction(), lambda done, total: None)
    with timed(costs, "fuse"):
        student, merged = build_networks(search.found.findings, plan, weights)
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in merged.modules())
    return (
        label,
        f"{speedup:.2f}",
        f"{search.front.original_ns / max(1, plan.latency_ns or 1):.2f}",
        f"{measured[0].median_ns / measured[1].median_ns:.2f}",
        f"{accuracy(merged, test_x, test_y):.2f}",
        f"{accuracy(fxmerge.fuse(tuning.tuned(student, search.found.findings.graph)), test_x, test_y):.2f}" if tuning.steps else "",
        convolutions,
        len(plan.merges),
    )


@dataclass(frozen=True)
class Tuning:
    """Calibration tuning with the usual augmentation of CIFAR: flips, and shifts of up to two pixels."""

    images: Tensor
    steps: int
    costs: dict[str, float]

    def tuned(self, student: GraphModule, original: GraphModule) -> GraphModule:
        with timed(self.costs, "tune (one plan a row)"):
            return fxmerge.tune.calibration_tune(student, original, self.images, steps=self.steps, augment=_moved)


def _moved(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    images = batch[0]
    flipped = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, images.flip(3), images)
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    height, width = images.shape[2:]
    return (F.pad(flipped, (2, 2, 2, 2))[:, :, down : down + height, right : right + width],)


#: What the fit is made of, one part more in every row.
PARTS: dict[str, fxmerge.Reconstruction] = {
    "merges alone, in order": fxmerge.Reconstruction(through=0, stay=False),
    "+ through the activation": fxmerge.Reconstruction(stay=False),
    "+ layers that stay": fxmerge.Reconstruction(),
    "layers that stay, not through the activation": fxmerge.Reconstruction(through=0),
}


def ablation(found: Survey, images: Tensor, options: argparse.Namespace, measured: Callable[[GraphModule], float]) -> str:
    """Top-1 of the plans of given predicted speed-ups, fitted with one part after the other."""
    front = found.study.front()
    plans = [front.plan(front.index(math.floor(front.original_ns / speedup))) for speedup in options.speedups]
    rows: list[list[str]] = []
    for label, scorer in PARTS.items():
        fitted = [build_networks(found.findings, plan, scorer.fit(found.findings, plan, found.batches)) for plan in plans]
        rows.append([label, *(f"{measured(merged):.2f}" for _, merged in fitted)])
        print(*rows[-1], flush=True)  # noqa: T201
        if options.steps and label in ("merges alone, in order", "+ layers that stay"):
            tuning = Tuning(images, options.steps, {})
            tuned = [fxmerge.fuse(tuning.tuned(student, found.findings.graph)) for student, _ in fitted]
            rows.append([f"{label}, then tuned", *(f"{measured(merged):.2f}" for merged in tuned)])
            print(*rows[-1], flush=True)  # noqa: T201
    heads = ("fit", *(f"{front.original_ns / (plan.latency_ns or 1):.2f}x predicted" for plan in plans))
    return tabulate(rows, heads, "github", disable_numparse=True)


def _kept(folder: Path | None, file: str, kind: Any, costs: dict[str, float], measure: Callable[[], Any]) -> Any:
    """A table from the folder, or measured and left there."""
    if folder is not None and (folder / file).exists():
        return kind.load(folder / file)
    with timed(costs, f"measure {file.split('.')[-2]}"):
        table = measure()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        table.save(folder / file)
    return table


def _title(options: argparse.Namespace) -> str:
    name, images = options.network, options.images
    asked = " ".join(map(str, options.speedups))
    extra = (
        f"{' --ablation' if options.ablation else ''}{' --ours' if options.ours else ''}{' --tables DIR' if options.tables else ''}"
    )
    command = f"python -m benchmarks.cifar10 --network {name} --images {images} --steps {options.steps} --speedups {asked}{extra}"
    return (
        f"# {name}, CIFAR-10 (JPEG), no training\n\n`{command}`, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, batch 128, float32, contiguous, eager; {images} unlabelled calibration images; "
        "speed-ups against the folded original, timed in turn."
    )


def _costs(costs: dict[str, float], latency: fxmerge.LatencyTable, useful: tuple[fxmerge.Proposal, ...]) -> str:
    rows = [(stage, f"{seconds:.2f}") for stage, seconds in costs.items()]
    counts = (
        f"{len(latency.candidates)} candidates, {len(latency.measurements)} distinct geometries measured, "
        f"{sum(len(p.candidates) for p in useful)} faster than leaving their stretch alone and scored. "
        "Solve, fit and fuse are sums over all rows."
    )
    return f"{counts}\n\n{tabulate(rows, ('stage', 'seconds'), 'github', disable_numparse=True)}"


if __name__ == "__main__":
    main()
