"""A small U-Net, trained here, compressed at given speed-ups: loss, sampling time and Frechet distance, before and after training.

    python -m benchmarks.ddpm small --cache ~/.cache/fxmerge-ddpm --out benchmarks/results/ddpm_small.md

Trains the U-Net and a classifier on 16x16 images (once: their weights, the tables and every finished step lie in --cache, and the
same command goes on where it was stopped). All candidates, and the baselines that remove activations only or prune layers only, get
their weights by the same closed-form fit, to inputs recorded along the sampler's trajectory, and then the same short training. Each
is scored by the noise-prediction loss on images held out, at stratified time steps with fixed noise, the same for all networks; by
the time of a whole sampling by DDIM, timed in turn with the folded original's; and by a Frechet distance between the features of a
classifier trained here for samples and for training images, which is no FID and compares with none. Beside the report goes a
picture of samples from the same noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.utils import make_grid, save_image

import fxmerge
from benchmarks.ddpm.images import SIZE, Images, images
from benchmarks.ddpm.networks import SCHEDULE, Features, small_unet
from benchmarks.ddpm.sampling import Ratio, ddim, frechet_distance, noise, prediction, seconds_in_turn
from benchmarks.ddpm.training import trained_classifier, trained_unet, tuned
from benchmarks.networks import accuracy
from fxmerge.budget import Budget
from fxmerge.core.files import write_json
from fxmerge.core.plan import Plan
from fxmerge.core.segment import narrowed
from fxmerge.measure.progress import Bars
from fxmerge.search import Search, build_networks
from fxmerge.survey import Survey
from fxmerge.trials import best_near

SPACES = {"all candidates": "joint", "activations only": "activations", "layers only": "layers"}

#: What fits weights, for scores and for plans: by as many positions as a fit of this size needs, in tasks of some seconds each, so
#: that a run that is stopped loses no more.
FIT = fxmerge.Reconstruction(rows_per_unknown=4, least_rows=8192, memory_bytes=512 << 20)

#: What measures latency; None for the clock.
TIMER: fxmerge.Timer | None = None

#: Options that change no figure.
_WHERE = ("cache", "out", "run", "command", "speedups", "spaces")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 64], help="channels at 16x16, 8x8, 4x4; multiples of 8")
    parser.add_argument("--layers", type=int, default=2, help="residual blocks of each level")
    parser.add_argument("--train-steps", type=int, default=3000, help="of the U-Net")
    parser.add_argument("--train-batch", type=int, default=32)
    parser.add_argument("--classifier-steps", type=int, default=600)
    parser.add_argument("--tune-steps", type=int, default=300, help="of the short training; 0 leaves it out")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.15, 1.3, 1.6])
    parser.add_argument("--spaces", nargs="+", choices=tuple(SPACES.values()), default=list(SPACES.values()))
    parser.add_argument("--batch", type=int, default=8, help="images that are sampled at a time where time is measured")
    parser.add_argument("--sampling-steps", type=int, default=100, help="of DDIM, where time is measured, and for the picture")
    parser.add_argument("--rounds", type=int, default=4, help="samplings of each network that are timed")
    parser.add_argument("--samples", type=int, default=256, help="for the Frechet distance")
    parser.add_argument("--frechet-steps", type=int, default=20, help="of DDIM, for the Frechet distance")
    parser.add_argument("--calibration", type=int, default=256, help="inputs recorded along the trajectory")
    parser.add_argument("--score-images", type=int, default=32, help="training images that candidates are scored on")
    parser.add_argument("--max-kernel", type=int, default=5, help="of candidates; time to fit grows by the power of six")
    parser.add_argument("--trials", type=int, default=8, help="plans near each budget that are fitted whole")
    parser.add_argument("--cache", type=Path, required=True, help="a folder for weights, tables and what is finished")
    parser.add_argument("--out", type=Path, help="also write the report to this file, and the picture beside it")


def run(options: argparse.Namespace) -> str:
    """The whole benchmark as one Markdown text."""
    with Bars(True) as bars:
        bench = Bench(options, bars)
        rows = [*bench.reference_rows(), *bench.rows()]
        heads = ("candidates", "asked", "network", "sampling", "training", "loss", "change of loss", "Frechet distance")
        table = tabulate(rows, heads, "github", disable_numparse=True)
        parts = [_title(options, bench), table]
        if options.out is not None:
            picture = options.out.with_suffix(".png")
            names = bench.draw(picture)
            parts.append(f"![samples]({picture.name})\n\nSamples from the same noise, a network a row: {'; '.join(names)}.")
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Bench:
    """One run: the trained networks, the tables, and a folder of what is finished."""

    options: argparse.Namespace
    bars: Bars

    @cached_property
    def folder(self) -> Path:
        """Of all that these options decide."""
        settings = {name: value for name, value in vars(self.options).items() if name not in _WHERE}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        return _made(self.options.cache / f"{self.options.data}-{digest}")

    @cached_property
    def images(self) -> Images:
        return images(self.options.data)

    @cached_property
    def unet(self) -> GraphModule:
        """Traced once, then trained: tracing takes longer than all that reads the graph."""
        o = self.options
        name = f"{o.data}-unet-{'-'.join(map(str, o.widths))}-{o.layers}-{o.train_steps}x{o.train_batch}"
        model = small_unet(o.widths, self.images.channels, o.layers)
        graph = fxmerge.trace(model, self.example)
        return trained_unet(graph, self.images, o.train_steps, o.train_batch, _made(o.cache / name), self.bars)

    @cached_property
    def features(self) -> Features:
        return Features(self.classifier)

    @cached_property
    def classifier(self) -> Any:
        steps = self.options.classifier_steps
        return trained_classifier(
            self.images, steps, _made(self.options.cache / f"{self.options.data}-classifier-{steps}"), self.bars
        )

    @cached_property
    def example(self) -> tuple[Tensor, Tensor]:
        count = self.options.batch
        return noise((count, self.images.channels, SIZE, SIZE), 0), torch.arange(count) * 999 // max(1, count - 1)

    @cached_property
    def findings(self) -> fxmerge.Findings:
        return fxmerge.find_segments(self.unet)

    @cached_property
    def original(self) -> GraphModule:
        return fxmerge.baseline(self.findings.graph)

    @cached_property
    def survey(self) -> Survey:
        """Both tables; importance is noise prediction on training images, with inputs of the trajectory to fit weights to."""
        o, findings = self.options, self.findings
        calls = max(1, o.calibration // 16)
        start = noise((16, *self.example[0].shape[1:]), 1)
        recorded = fxmerge.recorded_inputs(self.unet, lambda: ddim(self.unet, start, calls), most=calls)
        batches = fxmerge.as_batches(recorded, findings.graph)
        proposals = fxmerge.propose(findings, fxmerge.Space(max_kernel=o.max_kernel))
        scorer = fxmerge.NoisePrediction(images=self.images.train[: o.score_images], signal=_signal(), fit=FIT)
        with fxmerge.Store(self.folder / "tables.db") as store:
            latency = fxmerge.measure_latency(
                findings, proposals, self.example, timer=TIMER, store=store, progress=self.bars("latency")
            )
            useful = fxmerge.worthwhile(proposals, latency, findings.region)
            importance = fxmerge.measure_importance(
                findings, useful, recorded, scorer=scorer, latency=latency, store=store, progress=self.bars("importance")
            )
        return Survey("small U-Net", findings, useful, batches, latency, importance, self.example, fxmerge.Target())

    def losses(self, network: nn.Module) -> Tensor:
        """Of noise prediction, (N,), on the images held out, twice each, at stratified time steps with fixed noise."""
        held = fxmerge.NoisePrediction(images=self.images.holdout.repeat(2, 1, 1, 1), signal=_signal(), seed=1)
        found = []
        with torch.no_grad():
            for batch, target in held.holdout(self.findings):
                found.append((prediction(network(*batch)).double() - target.double()).pow(2).flatten(1).mean(1))
        return torch.cat(found)

    @cached_property
    def losses_before(self) -> Tensor:
        return self.losses(self.original)

    def distance(self, made: Tensor) -> float:
        return frechet_distance(self.features, self.images.train, made)

    def quality(self, network: nn.Module) -> dict[str, Any]:
        """Loss and its paired change with a standard error, and the Frechet distance of samples."""
        losses = self.losses(network)
        change = losses - self.losses_before
        o = self.options
        starts = noise((o.samples, *self.example[0].shape[1:]), 2).split(64)
        progress, made = self.bars("samples"), []
        for number, start in enumerate(starts):
            made.append(ddim(network, start, o.frechet_steps))
            progress(number + 1, len(starts))
        return {
            "loss": float(losses.mean()),
            "change": float(change.mean()),
            "error": float(change.std() / len(change) ** 0.5),
            "distance": self.distance(torch.cat(made)),
        }

    def reference_rows(self) -> Iterator[tuple[str, ...]]:
        """What the figures are to be read against."""
        found = _kept(self.folder / "holdout.json", lambda: self.distance(self.images.holdout))
        yield "(images held out, not samples)", "", "", "", "", "", "", f"{found:.3f}"
        quality = _kept(self.folder / "original.json", lambda: self.quality(self.original))
        yield "original, folded", "1.00x", "1.00x", "1.00x", "", *_figures(quality, original=True)
        self.drawn("original", lambda: self.original)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Two for every space and speed-up."""
        for label, space in SPACES.items():
            if space in self.options.spaces:
                for speedup in self.options.speedups:
                    yield from self.rows_of(label, space, speedup)

    def rows_of(self, label: str, space: str, speedup: float) -> Iterator[tuple[str, ...]]:
        """One plan, before and after training; every part of it is kept the moment it is there."""
        name = f"{space}-{speedup:g}"
        place = _made(self.folder / name)
        chosen = _kept(place / "chosen.json", lambda: self.choose(space, speedup, place))
        asked = f"{speedup:.2f}x"
        if "fastest" in chosen:
            yield label, asked, f"cannot; at most {chosen['fastest']:.2f}x", "", "", "", "", ""
            return

        @cache
        def student() -> GraphModule:
            found, _ = build_networks(self.findings, Plan.load(place / "plan.json"), {})
            found.load_state_dict(load_file(place / "student.safetensors"))
            return found

        @cache
        def merged() -> GraphModule:
            return fxmerge.fuse(student())

        @cache
        def trained() -> GraphModule:
            found = tuned(
                student(),
                self.findings.graph,
                self.images,
                self.options.tune_steps,
                self.options.train_batch,
                place / "training",
                self.bars,
            )
            return fxmerge.fuse(found)

        sampling = Ratio(**_kept(place / "sampling.json", lambda: vars(self.timed(merged()))))
        network = f"{chosen['measured']:.2f}x ({chosen['predicted']:.2f}x predicted), {chosen['merges']} merges"
        untrained = _kept(place / "untrained.json", lambda: self.quality(merged()))
        yield label, asked, network, str(sampling), "none", *_figures(untrained)
        self.drawn(f"{name} untrained", merged)
        if self.options.tune_steps:
            after = _kept(place / "trained.json", lambda: self.quality(trained()))
            yield "", "", "", "", f"{self.options.tune_steps} steps", *_figures(after)
            self.drawn(f"{name} trained", trained)

    def choose(self, space: str, speedup: float, place: Path) -> dict[str, Any]:
        """The plan of a budget with its weights, saved; what the tables said of it and what was measured."""
        offered = {c.id for p in fxmerge.propose(self.findings, fxmerge.Space.named(space)) for c in p.candidates}  # type: ignore[arg-type]
        found = replace(self.survey, proposals=narrowed(self.survey.proposals, lambda candidate: candidate.id in offered))
        search = Search(found, 0.03, TIMER)
        try:
            tried = search.within(Budget(1 / speedup), 4, self.bars(f"{space} {speedup:g}"))
        except fxmerge.BudgetError:
            original, merged = search.measure(search.front.plan(0))
            return {"fastest": original.median_ns / merged.median_ns}
        progress = self.bars("fit")
        plan, measured, weights = best_near(search, tried, Budget(1 / speedup), FIT, progress, trials=self.options.trials)
        student, _ = build_networks(self.findings, plan, weights)
        plan.save(place / "plan.json")
        save_file({name: tensor.contiguous() for name, tensor in student.state_dict().items()}, place / "student.safetensors")
        return {
            "predicted": search.front.original_ns / max(1, plan.latency_ns or 1),
            "measured": measured[0].median_ns / measured[1].median_ns,
            "merges": len(plan.merges),
        }

    def timed(self, merged: nn.Module) -> Ratio:
        o = self.options
        start = noise(self.example[0].shape, 3)
        return Ratio.of(*seconds_in_turn([self.original, merged], start, o.sampling_steps, o.rounds))

    def drawn(self, name: str, network: Callable[[], nn.Module]) -> Tensor:
        """Twelve samples, of the same noise for all."""
        path = _made(self.folder / "samples") / f"{name}.safetensors"
        if not path.exists():
            start = noise((12, *self.example[0].shape[1:]), 4)
            save_file({"samples": ddim(network(), start, self.options.sampling_steps).contiguous()}, path)
        return load_file(path)["samples"]

    def draw(self, picture: Path) -> list[str]:
        """The picture, and what its rows are."""
        names = ["original"]
        for speedup in self.options.speedups:
            for state in ("untrained", "trained"):
                name = f"joint-{speedup:g} {state}"
                if (self.folder / "samples" / f"{name}.safetensors").exists():
                    names.append(name)
        samples = torch.cat([load_file(self.folder / "samples" / f"{name}.safetensors")["samples"] for name in names])
        grid = make_grid((samples + 1) / 2, nrow=12, padding=1, pad_value=0.5)
        save_image(grid.repeat_interleave(2, 1).repeat_interleave(2, 2), picture)
        return [name.replace("joint-", "all candidates at ") for name in names]


def _signal() -> Tensor:
    return DDPMScheduler(**SCHEDULE).alphas_cumprod


def _figures(quality: dict[str, Any], *, original: bool = False) -> tuple[str, str, str]:
    change = "" if original else f"{quality['change']:+.5f} +- {quality['error']:.5f}"
    return f"{quality['loss']:.5f}", change, f"{quality['distance']:.3f}"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a JSON file holds, or what is made now and left there."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def _title(options: argparse.Namespace, bench: Bench) -> str:
    o = options
    parameters = sum(p.numel() for p in bench.unet.parameters())
    where = ("run", "command", "cache", "out")
    said = [f"--{name.replace('_', '-')} {_text(value)}" for name, value in vars(o).items() if name not in where]
    top1 = accuracy(bench.classifier, bench.images.holdout, bench.images.holdout_classes)
    return (
        f"# A small diffusion U-Net, {o.data} at {SIZE}x{SIZE}\n\n`python -m benchmarks.ddpm small {' '.join(said)} --cache DIR`, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, float32, contiguous, eager. {parameters:,} parameters, trained here for "
        f"{o.train_steps} steps of {o.train_batch} images.\n\n"
        f"Network: one call at batch {o.batch}; sampling: {o.sampling_steps} steps of DDIM at batch {o.batch}, end to end, median "
        f"and quartiles of {o.rounds} rounds; both against the folded original, in turn with it. Loss: noise prediction on "
        f"{2 * len(bench.images.holdout)} noised images held out; its change is paired, with a standard error. Frechet distance: "
        f"of {o.samples} samples ({o.frechet_steps} steps of DDIM) to the {len(bench.images.train):,} training images, in the "
        f"features of a classifier trained here (top-1 {top1:.1f} % on images held out); it is not the FID. Weights without "
        f"training: in closed form, from {o.calibration} inputs along the sampler's trajectory. Training: {o.tune_steps} steps of "
        f"{o.train_batch} images, the original as teacher."
    )


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
