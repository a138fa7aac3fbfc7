"""What the two tables of a network take, and how well they predict.

    python -m benchmarks.tables --network resnet34 --network mobilenet_v2 --network unet --images 256 --store tables.db

Weights are random: they do not matter for time; norms have the statistics of noise. For each of three budgets the plan is built and
timed beside the folded original: predicted and measured latency before any correction, then after each round of measure, correct,
solve again. Run it again with the same store and what was measured is not measured again. `--screening` tells what scoring the less
promising candidates on few images only costs: it scores all on all images as well, and compares the fronts.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import resource
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn

import fxmerge
from benchmarks.reports import deliver
from benchmarks.stages import timed
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.measure.paging import KEPT
from fxmerge.measure.progress import Bars
from fxmerge.measure.store import opened
from fxmerge.measure.timer import for_networks
from fxmerge.search import Search
from fxmerge.survey import Survey

NETWORKS = ("resnet34", "mobilenet_v2", "unet")
ROUNDS = 31
"""Samples of a whole network when a prediction is judged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", action="append", help=f"of torchvision, or unet; default {', '.join(NETWORKS)}")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.2, 1.4, 1.6])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--latency-only", action="store_true", help="losses are made up: for predictions alone")
    parser.add_argument("--screening", action="store_true")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    parts = [run(name, options) for name in options.network or NETWORKS]
    deliver("\n\n".join((_title(options), *parts)), options.out)


def network(name: str, size: int = 224) -> nn.Module:
    """A network of random weights, its norms with the statistics of noise: else nothing would come through, and all losses be 0."""
    torch.manual_seed(0)
    made: nn.Module
    if name == "unet":
        import segmentation_models_pytorch as smp

        made = smp.Unet("resnet18", encoder_weights=None, classes=8)
    else:
        made = torchvision.models.get_model(name, weights=None)
    made.train()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        made(torch.randn(16, 3, size, size))
    return made.eval()


def run(name: str, options: argparse.Namespace) -> str:
    """One network's tables as Markdown."""
    seconds: dict[str, float] = {}

    model = network(name, options.size)
    example = torch.randn(options.batch, 3, options.size, options.size)
    images = torch.randn(options.images, 3, options.size, options.size, generator=torch.Generator().manual_seed(1))
    target = fxmerge.Target(channels_last=options.channels_last, backend=options.backend)
    with torch.no_grad(), opened(options.store) as store, Bars(True) as bars:
        with timed(seconds, "trace"):
            graph = fxmerge.trace(model, example)
        with timed(seconds, "find segments"):
            findings = fxmerge.find_segments(graph)
        with timed(seconds, "propose candidates"):
            proposals = fxmerge.propose(findings)
        with timed(seconds, "latency table"):
            told = bars(f"{name} latency")
            latency = fxmerge.measure_latency(findings, proposals, (example,), target=target, store=store, progress=told)
        useful = fxmerge.worthwhile(proposals, latency, findings.region)
        with timed(seconds, "importance table"):
            importance = _importance(findings, useful, images, latency, store, options, bars, name)
        batches = fxmerge.as_batches(images[:1], graph)
        found = Survey(name, findings, useful, batches, latency, importance, (example,), target)
        search = Search(found, 0.03, for_networks(ROUNDS))
        with timed(seconds, "solve"):
            front = search.front
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        text = _counts(name, latency, found, importance, front, memory)
        rows = [row for speedup in options.speedups for row in _predictions(search, speedup)]
        screening = _screening(found, images, options, bars) if options.screening else ""
    stages = tabulate([(stage, f"{s:.2f}") for stage, s in seconds.items()], ("stage", "seconds"), "github", disable_numparse=True)
    heads = ("asked", "round", "predicted", "measured", "predicted / measured latency", "measured / asked latency", "merges")
    return "\n\n".join(filter(None, (text, stages, tabulate(rows, heads, "github", disable_numparse=True), screening)))


def _importance(
    findings: fxmerge.Findings,
    useful: tuple[fxmerge.Proposal, ...],
    images: torch.Tensor,
    latency: fxmerge.LatencyTable,
    store: fxmerge.Store | None,
    options: argparse.Namespace,
    bars: Bars,
    name: str,
) -> fxmerge.ImportanceTable:
    if options.latency_only:
        draw = random.Random(0)
        made_up = {c.id: (0.5 + len(c.activations)) ** 2 * draw.uniform(0.5, 1.5) for p in useful for c in p.candidates}
        return fxmerge.ImportanceTable({key: fxmerge.Importance(loss, 0, "made up") for key, loss in made_up.items()})
    progress = bars(f"{name} importance")
    return fxmerge.measure_importance(findings, useful, images, latency=latency, store=store, progress=progress)


def _predictions(search: Search, speedup: float) -> list[tuple[Any, ...]]:
    """Measured beside predicted: the plan as solved, and after each correction of the budget, two at most."""
    rows = []
    budget = search.front.original_ns / speedup
    for number in range(3):
        plan = search.front.pick(int(max(budget, search.front.fastest_ns)))
        original, merged = search.measure(plan)
        # The budget, and what was predicted, are for the original as it was in the table; the machine may be slower now.
        predicted = search.front.original_ns / max(1, plan.latency_ns or 1)
        measured = original.median_ns / merged.median_ns
        rows.append(
            (
                f"{speedup:.2f}x" if number == 0 else "",
                number,
                f"{predicted:.3f}x",
                f"{measured:.3f}x +- {_spread(original, merged):.3f}",
                f"{measured / predicted:.3f}",
                f"{speedup / measured:.3f}",
                len(plan.merges),
            )
        )
        if abs(speedup / measured - 1) <= 0.03 or plan.latency_ns == search.front.fastest_ns:
            break
        budget *= measured / speedup
    return rows


def _spread(original: fxmerge.Measurement, merged: fxmerge.Measurement) -> float:
    """Of the ratio, from the quartiles of both."""
    relative = original.spread_ns / original.median_ns + merged.spread_ns / merged.median_ns
    return relative / 2 * original.median_ns / merged.median_ns


def _counts(
    name: str,
    latency: fxmerge.LatencyTable,
    found: Survey,
    importance: fxmerge.ImportanceTable,
    front: ParetoFront,
    memory: float,
) -> str:
    composed = sum(c.kind != "fitted" for p in fxmerge.propose(found.findings) for c in p.candidates)
    samples = [score.samples for score in importance.candidates.values()]
    share = latency.remainder_ns / latency.network.median_ns
    return (
        f"## {name}\n\n{len(found.findings.segments)} segments; {len(latency.candidates)} candidates, {composed} of them published "
        f"(composed or dropped), the others fitted; {len(latency.measurements)} distinct geometries timed; "
        f"{len(found.candidates)} candidates faster than what they replace, {sum(n == max(samples) for n in samples)} of them "
        f"scored on all images; {share:.1%} of the network's latency in no entry; front of {len(front)} plans; peak memory "
        f"{memory:.1f} GB."
    )


def _screening(found: Survey, images: torch.Tensor, options: argparse.Namespace, bars: Bars) -> str:
    """How much better the plans of a table would be in which every candidate is scored on all images."""
    whole = fxmerge.measure_importance(found.findings, found.proposals, images, progress=bars("all on all"))
    tables = {"screened": found.importance, "all on all": whole}
    fronts = {
        key: fxmerge.solve(found.findings.region, found.candidates, found.latency, table, found.findings.fingerprint)
        for key, table in tables.items()
    }
    rows = []
    for speedup in options.speedups:
        plans = {key: front.pick(int(front.original_ns / speedup)) for key, front in fronts.items()}
        rows.append((f"{speedup:.2f}x", *(f"{_loss(plan, whole):.4g}" for plan in plans.values())))
    heads = ("asked", "loss of the plan solved from rough and full scores", "... from full scores alone")
    return tabulate(rows, heads, "github", disable_numparse=True)


def _loss(plan: Plan, table: fxmerge.ImportanceTable) -> float:
    return sum(table.loss(merge.id) for merge in plan.merges)


def _title(options: argparse.Namespace) -> str:
    networks = " ".join(f"--network {name}" for name in options.network or NETWORKS)
    flags = " --channels-last" * options.channels_last + " --latency-only" * options.latency_only
    kept = KEPT + " " if all(os.environ.get(name) == value for name, value in (one.split("=") for one in KEPT.split())) else ""
    return (
        f"# Tables: what they take, and what they predict\n\n`{kept}python -m benchmarks.tables {networks} --size {options.size} "
        f"--batch {options.batch} --images {options.images} --backend {options.backend}{flags}`, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads, float32, random weights. Speed-ups are against the "
        "folded original, timed in turn."
    )


if __name__ == "__main__":
    main()
