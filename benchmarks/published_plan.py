"""The plan that LayerMerge published for MobileNetV2-1.0 (13.4 ms, 2.49x), beside our own of equal predicted loss.

    python -m benchmarks.published_plan --weights mobilenet_v2.pth --images /data/imagenet/train --count 256 --store tables.db

Both are timed in turn with the original as it is and with the original folded, in eager mode and under inductor. Without --weights
and --images, weights are random and the images noise: times are right, losses mean nothing. The published plan puts an activation
behind merged segments that end in a linear bottleneck, and is timed with them; its loss, which is before any training, is that
without them, which is less.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Collection
from pathlib import Path

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import fxmerge
from benchmarks.numbered import convolutions, expressed, fastest_within, loss_of
from benchmarks.reports import deliver
from benchmarks.stages import timed
from fxmerge.core.plan import Plan
from fxmerge.data import read_images
from fxmerge.measure.progress import Bars
from fxmerge.measure.store import opened
from fxmerge.search import build_networks

#: Convolutions, numbered from the stem, that an activation is kept behind (a merge ends there), and those pruned.
KEPT = (0, 5, 8, 11, 14, *range(17, 36), *range(38, 51))
PRUNED = (1, 7, 13, 37)
#: What the published plan is made of.
COMPOSED = fxmerge.Space(fitted=False)
PUBLISHED = fxmerge.Space(fitted=False, added=True)

#: What measures the two tables; None for the clock, and for the closed form.
TIMER: fxmerge.Timer | None = None
SCORER: fxmerge.Scorer | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, help="a state dict of torchvision's mobilenet_v2")
    parser.add_argument("--images", help="an ImageFolder, for calibration")
    parser.add_argument("--count", type=int, default=256, help="images")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--backends", nargs="+", default=["eager", "inductor"])
    parser.add_argument("--max-kernel", type=int, default=7)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    deliver(run(options), options.out)


def plan_of(
    findings: fxmerge.Findings, kept: Collection[int], pruned: Collection[int], *, space: fxmerge.Space = PUBLISHED
) -> Plan:
    """A plan written as in LayerMerge: where activations stay, and which convolutions go, by number in graph order.

    Raises:
        LookupError: no segment holds such a run of convolutions, or none can be pruned so.
    """
    plan, refused = expressed(findings, convolutions(findings), kept, pruned, space=space)
    if refused:
        raise LookupError(refused[0])
    return plan


def run(options: argparse.Namespace) -> str:
    """Tables, both plans, and what each network takes, as Markdown."""
    seconds: dict[str, float] = {}
    model = network(options.weights).to(options.device, getattr(torch, options.dtype))
    images = calibration(options).to(options.device, getattr(torch, options.dtype))
    example = torch.randn(options.batch, 3, options.size, options.size, device=options.device, dtype=images.dtype)
    target = fxmerge.Target(options.device, options.dtype, options.channels_last, options.backends[0])
    with torch.no_grad(), opened(options.store) as store, Bars(True) as bars:
        findings = fxmerge.find_segments(fxmerge.trace(model, example))
        published = plan_of(findings, KEPT, PRUNED)
        offered = fxmerge.propose(findings, fxmerge.Space(max_kernel=options.max_kernel))
        with timed(seconds, "latency table"):
            latency = fxmerge.measure_latency(
                findings, offered, (example,), target=target, timer=TIMER, store=store, progress=bars("latency")
            )
        useful = fxmerge.worthwhile(offered, latency, findings.region)
        with timed(seconds, "importance table"):
            importance = fxmerge.measure_importance(
                findings, useful, images, scorer=SCORER, latency=latency, store=store, progress=bars("importance")
            )
        with timed(seconds, "solve"):
            candidates = [candidate for proposal in useful for candidate in proposal.candidates]
            front = fxmerge.solve(findings.region, candidates, latency, importance, findings.fingerprint)
        bare = plan_of(findings, KEPT, PRUNED, space=COMPOSED)
        loss = loss_of(findings, bare, images, space=COMPOSED, scorer=SCORER)
        own = fastest_within(front, loss)
        with timed(seconds, "fit"):
            weights = fxmerge.fit(findings, own, images)
        networks = {
            "original": findings.graph,
            "original, folded": fxmerge.baseline(findings.graph),
            "published plan": build_networks(findings, published, {})[1],
            "our plan": build_networks(findings, own, weights)[1],
        }
        rows = [row for backend in options.backends for row in timings(networks, example, target, backend)]
    heads = ("back end", "network", "ms", "against the original", "against the folded original", "convolutions")
    stages = tabulate([(stage, f"{s:.1f}") for stage, s in seconds.items()], ("stage", "seconds"), "github", disable_numparse=True)
    plans = "\n".join(f"    {merge.id}" for merge in own.merges)
    return "\n\n".join(
        (
            _title(options),
            f"Predicted loss: {loss:.4g} of the published plan, {own.loss:.4g} of ours, the fastest that loses no more.",
            tabulate(rows, heads, "github", disable_numparse=True),
            f"Our plan, {len(own.merges)} merges:\n\n{plans}",
            stages,
        )
    )


def network(weights: Path | None) -> nn.Module:
    """torchvision's MobileNetV2-1.0, with weights from a file or random ones, whose norms know what goes through them."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.mobilenet_v2(weights=None)
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        awaken(model, torch.randn(32, 3, 96, 96))
    return model.eval()


@torch.no_grad()
def awaken(model: nn.Module, images: Tensor) -> None:
    """Statistics of these images for the norms, and logits of size 1: as initialised, signals fade to nothing, and so do losses."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # all that came, in equal parts
    model.train()(images)
    logits = model.eval()(images)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.weight.div_(logits.std())


def calibration(options: argparse.Namespace) -> Tensor:
    """Images (N, 3, size, size) from a folder, or noise."""
    if options.images:
        return read_images(options.images, count=options.count, size=(options.size, options.size))
    return torch.randn(options.count, 3, options.size, options.size, generator=torch.Generator().manual_seed(1))


def timings(networks: dict[str, nn.Module], example: Tensor, target: fxmerge.Target, backend: str) -> list[tuple[object, ...]]:
    """A row for each network, all timed in turn; speed-ups against the first and the second."""
    there = fxmerge.Target(target.device, target.dtype, target.channels_last, backend)
    measured = (TIMER or fxmerge.compare)([fxmerge.Timed(module, (example,)) for module in networks.values()], target=there)
    as_is, folded = measured[0].median_ns, measured[1].median_ns
    return [
        (
            backend,
            name,
            f"{found.median_ns / 1e6:.2f} +- {found.spread_ns / 2e6:.2f}",
            f"{as_is / found.median_ns:.2f}x",
            f"{folded / found.median_ns:.2f}x",
            sum(isinstance(module, nn.Conv2d) for module in networks[name].modules()),
        )
        for name, found in zip(networks, measured, strict=True)
    ]


def _title(options: argparse.Namespace) -> str:
    weights = "given weights" if options.weights else "random weights, norms with the statistics of noise"
    images = "images" if options.images else "noise"
    layout = "channels-last" if options.channels_last else "contiguous"
    return (
        f"# The published plan of MobileNetV2-1.0 beside ours\n\nBatch {options.batch}, {options.size} pixels, {options.device}, "
        f"{options.dtype}, {layout}, {torch.get_num_threads()} threads, {weights}, "
        f"{options.count} calibration {images}; tables measured under {options.backends[0]}; torch {torch.__version__}, Python "
        f"{platform.python_version()}. Medians, all networks timed in turn."
    )


if __name__ == "__main__":
    main()
