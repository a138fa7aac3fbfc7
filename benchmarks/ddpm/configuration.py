"""The CIFAR-10 DDPM's configuration with random weights: tables, plans predicted and measured, the published plan beside ours.

    python -m benchmarks.ddpm cifar-configuration --batch 1 --losses made-up --store tables.db
    python -m benchmarks.ddpm cifar-configuration --device cuda --dtype bfloat16 --batch 128 --backends eager inductor --store g.db

Weights are random, which changes no time. Losses are those of the closed-form fit to inputs recorded along the
trajectory of the sampler with these weights; or made up (one for every activation or norm taken out, one for every convolution
pruned), where there is no time for them: either way they say what the solver did, nothing of samples. The published plan removes
activations and prunes convolutions by number, and moves the norm between two convolutions behind the merged one; here that is one
convolution of the same size, fitted, with the norm behind it, and an identity for a convolution that is pruned alone.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxmerge
from benchmarks.ddpm.networks import cifar_unet
from benchmarks.ddpm.sampling import Ratio, ddim, noise, seconds_in_turn
from benchmarks.made_up import MadeUp
from benchmarks.numbered import convolutions, expressed, fastest_within, loss_of, norm_behind
from benchmarks.stages import timed
from fxmerge.budget import Budget
from fxmerge.core.plan import Plan
from fxmerge.measure.progress import Bars
from fxmerge.measure.store import opened
from fxmerge.search import Search, build_networks
from fxmerge.survey import Survey

#: The published plan, convolutions numbered in the order they run, from 1, without shortcuts: activations removed behind these,
REMOVED = (2, 4, 7, 39, 41, 43, 46, 48, 50)
#: ... and these convolutions pruned.
PRUNED = (2, 5, 31, 38, 40, 42, 44, 45, 47, 49, 51)

#: What measures the tables and whole networks; None for the clock.
TIMER: fxmerge.Timer | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the network, from tracing on: it is a constant of the graph")
    parser.add_argument("--backends", nargs="+", default=["eager"], help="the first is that of the tables")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--width", type=int, default=128, help="channels of the first level; 128 is the configuration")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.15, 1.3, 1.5])
    parser.add_argument("--losses", choices=("reconstruction", "made-up"), default="reconstruction")
    parser.add_argument("--images", type=int, default=64, help="calibration inputs along the trajectory")
    parser.add_argument("--score-images", type=int, default=16, help="of these, how many losses are measured on")
    parser.add_argument("--rows-per-unknown", type=int, default=2, help="positions that fits see, for every weight of a filter")
    parser.add_argument("--max-kernel", type=int, default=5)
    parser.add_argument("--fit-mib", type=int, default=1024, help="for one fit's equations; larger candidates are not scored")
    parser.add_argument("--sampling-steps", type=int, default=10, help="of DDIM, timed end to end")
    parser.add_argument("--rounds", type=int, default=5, help="samplings of each network that are timed")
    parser.add_argument("--store", type=Path, help="a file for the tables; a second run goes on from it")
    parser.add_argument("--out", type=Path, help="also write the report to this file")


def _counted(segment: fxmerge.Segment, candidate: fxmerge.Candidate) -> float:
    """A fitted kernel that is smaller than what it stands for counts as if convolutions of 3x3 were pruned from it."""
    if candidate.exact:
        return 0.0
    if candidate.kind == "identity":
        pruned: float = len(segment.convolutions)
    elif candidate.kind == "composed":
        pruned = len(set(segment.convolutions).intersection(candidate.removed))
    else:
        whole, kept = (sum(geometry.kernel) for geometry in (segment.expression.geometry, candidate.geometry))
        pruned = (whole - kept) / (2 * max(1, len(candidate.geometry.axes)))
    norms_out = len(candidate.norms) - bool(candidate.moved)
    return len(candidate.activations) + norms_out + pruned


def run(options: argparse.Namespace) -> str:
    """Tables, plans, the published plan and whole samplings, as one Markdown text."""
    seconds: dict[str, float] = {}
    o = options
    target = fxmerge.Target(o.device, o.dtype, o.channels_last, o.backends[0])
    dtype = getattr(torch, o.dtype)
    example = inputs(o.batch, o.device, dtype)
    with torch.no_grad(), opened(o.store) as store, Bars(True) as bars:
        model = cifar_unet(o.width).to(o.device, dtype)
        with timed(seconds, "trace, find, propose"):
            findings = searched(model, example)
            space = fxmerge.Space(max_kernel=o.max_kernel)
            proposals = fxmerge.propose(findings, space)
        published, refused = published_plan(findings, space)
        with timed(seconds, "latency table"):
            latency = fxmerge.measure_latency(
                findings, proposals, example, target=target, timer=TIMER, store=store, progress=bars("latency")
            )
        useful = fxmerge.worthwhile(proposals, latency, findings.region)
        recorded = trajectory(model, o.images, o.device, dtype) if o.losses == "reconstruction" else [inputs(2, o.device, dtype)]
        scorer = MadeUp("made up 2", _counted) if o.losses == "made-up" else _reconstruction(o)
        with timed(seconds, "importance table"):
            importance = fxmerge.measure_importance(
                findings, useful, recorded, scorer=scorer, latency=latency, store=store, progress=bars("importance")
            )
            theirs = loss_of(findings, published, recorded, space=space, scorer=scorer, store=store)
        batches = fxmerge.as_batches(recorded, findings.graph)
        search = Search(Survey("CIFAR-10 U-Net", findings, useful, batches, latency, importance, example, target), 0.03, TIMER)
        with timed(seconds, "solve"):
            own = fastest_within(search.front, theirs)
        with timed(seconds, "budgets"):
            budgets = [_budget(search, speedup, bars) for speedup in o.speedups]
        fastest = next((plan for plan, _ in reversed(budgets) if plan is not None), None)
        plans = {"published plan": published, "our plan of its predicted loss": own}
        if fastest is not None:
            plans[f"our plan of {search.front.original_ns / (fastest.latency_ns or 1):.2f}x predicted"] = fastest
        with timed(seconds, "whole networks and samplings"):
            networks = {"original, folded": search.original}
            networks |= {name: build_networks(findings, plan, {})[1] for name, plan in plans.items()}
            losses = {"published plan": theirs} | {name: plan.loss for name, plan in plans.items() if plan is not published}
            rows = [row for backend in o.backends for row in whole(networks, losses, o, backend)]
    heads = ("back end", "network", "predicted loss", "ms a call", "speed-up", "DDIM, end to end", "convolutions beyond 1x1")
    spent = [(stage, f"{s:.1f}") for stage, s in seconds.items()]
    return "\n\n".join(
        (
            _title(o, model),
            f"{len(findings.segments)} segments, {len(latency.candidates)} candidates, {len(latency.measurements)} distinct "
            f"geometries timed, {len(search.survey.candidates)} candidates faster than what they replace and scored; front of "
            f"{len(search.front)} plans; {latency.remainder_ns / latency.network.median_ns:.1%} of the latency in no entry.",
            tabulate(
                [row for _, row in budgets],
                ("asked", "predicted", "measured", "predicted loss", "merges"),
                "github",
                disable_numparse=True,
            ),
            _told(published, refused, search),
            tabulate(rows, heads, "github", disable_numparse=True),
            "Our plan of the published plan's predicted loss:\n\n" + "\n".join(f"    {merge.id}" for merge in own.merges),
            tabulate(spent, ("stage", "seconds"), "github", disable_numparse=True),
        )
    )


def searched(model: nn.Module, example: tuple[Tensor, Tensor]) -> fxmerge.Findings:
    return fxmerge.find_segments(fxmerge.trace(model, example))


def inputs(batch: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Noise, and time steps of which no two are alike."""
    return noise((batch, 3, 32, 32), 0, device).to(dtype), (torch.arange(batch) * 999 // max(1, batch - 1)).to(device)


def trajectory(model: nn.Module, count: int, device: str, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], ...]:
    """Inputs along the sampler's trajectory, four images at a time."""
    calls = max(1, count // 4)
    start = noise((4, 3, 32, 32), 1, device).to(dtype)
    return fxmerge.recorded_inputs(model, lambda: ddim(model, start, calls), most=calls)  # type: ignore[return-value]


def _reconstruction(options: argparse.Namespace) -> fxmerge.Reconstruction:
    return fxmerge.Reconstruction(
        rows_per_unknown=options.rows_per_unknown,
        least_rows=4096,
        score_images=options.score_images,
        memory_bytes=options.fit_mib << 20,
        coarse_images=max(1, options.score_images // 8),
    )


def published_plan(findings: fxmerge.Findings, space: fxmerge.Space | None = None) -> tuple[Plan, tuple[str, ...]]:
    """The published plan in this network's own names, and what of it cannot be merged here."""
    names = convolutions(findings, but=lambda path: path.endswith("conv_shortcut"))
    kept = set(range(1, len(names) + 1)) - set(REMOVED)
    return expressed(findings, names, kept, PRUNED, fits=norm_behind, space=space, first=1)


def _budget(search: Search, speedup: float, bars: Bars) -> tuple[Plan | None, tuple[str, ...]]:
    """The plan that measures within a budget, and its row."""
    try:
        plan, (original, merged) = search.within(Budget(1 / speedup), 4, bars(f"{speedup:g}x"))
    except fxmerge.BudgetError as refusal:
        return None, (f"{speedup:.2f}x", "", f"cannot; fastest {refusal.fastest_ns / 1e6:.2f} ms", "", "")
    predicted = search.front.original_ns / max(1, plan.latency_ns or 1)
    measured = original.median_ns / merged.median_ns
    return plan, (f"{speedup:.2f}x", f"{predicted:.3f}x", f"{measured:.3f}x", f"{plan.loss:.4g}", str(len(plan.merges)))


def whole(
    networks: Mapping[str, nn.Module], losses: Mapping[str, float], options: argparse.Namespace, backend: str
) -> list[tuple[object, ...]]:
    """A row for each network under one back end: a call, and a whole sampling, all in turn."""
    o = options
    target = fxmerge.Target(o.device, o.dtype, o.channels_last, backend)
    dtype = getattr(torch, o.dtype)
    there = [fxmerge.Timed(module, inputs(o.batch, o.device, dtype)) for module in networks.values()]
    calls = (TIMER or fxmerge.compare)(there, target=target)
    start = noise((o.batch, 3, 32, 32), 2, o.device).to(dtype)
    layout = torch.channels_last if o.channels_last else torch.contiguous_format
    ready = [_ready(module.to(memory_format=layout), backend) for module in map(copy.deepcopy, networks.values())]
    seconds = seconds_in_turn(ready, start, o.sampling_steps, o.rounds)
    return [
        (
            backend,
            name,
            "" if name not in losses else f"{losses[name]:.4g}",
            f"{call.median_ns / 1e6:.2f} +- {call.spread_ns / 2e6:.2f}",
            f"{calls[0].median_ns / call.median_ns:.2f}x",
            str(Ratio.of(seconds[0], found)),
            sum(isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) for layer in networks[name].modules()),
        )
        for name, call, found in zip(networks, calls, seconds, strict=True)
    ]


def _ready(network: nn.Module, backend: str) -> nn.Module:
    """As it will be sampled with."""
    return network if backend == "eager" else torch.compile(network, backend=backend)  # type: ignore[return-value]


def _told(published: Plan, refused: Sequence[str], search: Search) -> str:
    """What became of the published plan."""
    merges = "\n".join(f"    {merge.id}" for merge in published.merges)
    told = "\n".join(f"- refused: {reason}" for reason in refused) or "Nothing of it is refused."
    return f"The published plan, {len(published.merges)} merges:\n\n{merges}\n\n{told}"


def _title(options: argparse.Namespace, model: nn.Module) -> str:
    o = options
    said = " ".join(
        f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in vars(o).items()
        if name not in ("run", "command", "out", "store") and not isinstance(value, bool)
    )
    there = torch.cuda.get_device_name(o.device) if o.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    return (
        f"# The CIFAR-10 DDPM's configuration, random weights\n\n`python -m benchmarks.ddpm cifar-configuration {said}"
        f"{' --channels-last' * o.channels_last}`, torch {torch.__version__}, diffusers {diffusers.__version__}, Python "
        f"{platform.python_version()}, {there}. {sum(p.numel() for p in model.parameters()):,} parameters. Losses: {o.losses}. "
        f"Speed-ups are against the folded original, in turn with it; samplings are of {o.sampling_steps} steps of DDIM at batch "
        f"{o.batch}, median and quartiles of {o.rounds} rounds."
    )
