"""ImageNet by the published protocol, one command for each row of LayerMerge's tables; for those who have the data.

    accelerate launch -m benchmarks.imagenet --data /data/imagenet --row resnet34-1.36 --out runs/resnet34-1.36
    accelerate launch --multi_gpu --mixed_precision bf16 -m benchmarks.imagenet --data /imagenet --row mobilenet_v2-2.49 --out x

The data is two ImageFolders, train/ and val/. Weights are torchvision's pretrained ones, or a state dict in safetensors
(--weights). The network is compressed to the speed-up that the row was published with, measured here; then trained as
published: ResNet-34 for 90 epochs of batch 1024, learning rate 1.024 after 8 epochs of warm-up, label smoothing 0.1;
MobileNetV2-1.0 for 180 epochs of batch 256, 0.05. --method layermerge takes the published candidates, objective and scorer (of
as many steps as --scorer-steps says), layer by layer, no teacher; --method fxmerge, the default, fitted candidates, merged
already, with the original as teacher. Interrupted, the same command goes on. The published speed-ups are of an RTX 2080 Ti, and
of unfolded originals; here the original is folded.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import fxmerge
from benchmarks.kept import otherwise
from fxmerge.core.files import write_json
from fxmerge.data import IMAGENET
from fxmerge.measure.progress import Bars
from fxmerge.trials import TRIALS
from fxmerge.tune import Distillation, Recipe, calibrate_norms, fine_tune, top1


@dataclass(frozen=True)
class Row:
    """One row of the published tables: network, top-1 in percent of the original and of theirs, their speed-up in PyTorch."""

    network: str
    original: float
    published: float
    speedup: float


@dataclass(frozen=True)
class Protocol:
    """How a network was trained after it was compressed."""

    epochs: int
    batch: int
    learning_rate: float
    warm_up_epochs: int
    momentum: float
    weight_decay: float
    label_smoothing: float


_PUBLISHED = {
    "resnet34": (74.42, ((74.26, 1.36), (73.46, 1.56), (72.84, 1.79))),
    "mobilenet_v2": (72.89, ((72.99, 1.63), (72.46, 1.90), (71.74, 2.18), (70.99, 2.49))),
}
ROWS: Mapping[str, Row] = {
    f"{network}-{speedup}": Row(network, original, accuracy, speedup)
    for network, (original, rows) in _PUBLISHED.items()
    for accuracy, speedup in rows
}
PROTOCOLS: Mapping[str, Protocol] = {
    "resnet34": Protocol(90, 1024, 1.024, 8, 0.875, 2**-15, 0.1),
    "mobilenet_v2": Protocol(180, 256, 0.05, 0, 0.9, 1e-5, 0.0),
}

#: How long other processes wait for the first, which compresses.
_PATIENCE = timedelta(days=7)

#: What measures the two tables; None for the clock, and for what the method says.
TIMER: fxmerge.Timer | None = None
SCORER: fxmerge.Scorer | None = None


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with the ImageFolders train/ and val/")
    parser.add_argument("--row", choices=ROWS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", choices=("fxmerge", "layermerge"), default="fxmerge")
    parser.add_argument("--weights", type=Path, help="a state dict, safetensors; without, torchvision's are downloaded")
    parser.add_argument("--calibration", type=int, default=1024, help="images, unlabelled, from train/")
    parser.add_argument("--scorer-steps", type=int, default=50, help="of the published scorer, 64 images each")
    parser.add_argument("--epochs", type=int, help="instead of the published number; 0 for no training")
    parser.add_argument("--batch", type=int, help="of all processes together, instead of the published")
    parser.add_argument("--latency-batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=8)
    report = run(parser.parse_args(arguments))
    if report:
        print(report)  # noqa: T201
    return report


def run(options: argparse.Namespace) -> str:
    """One row; the report, or nothing on processes other than the first."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    row, options.out = ROWS[options.row], options.out.resolve()
    data = Data(options)
    model = network(row.network, options.weights)
    start = options.out / "start"
    if accelerator.is_main_process and not _made(options):
        compressed(model, row, data, options, accelerator.device)
    accelerator.wait_for_everyone()
    loaded = fxmerge.load(start, model)
    epochs = PROTOCOLS[row.network].epochs if options.epochs is None else options.epochs
    with Bars(accelerator.is_main_process) as bars:
        trained = fine_tune(
            loaded.student,
            data.batches(accelerator.num_processes, PROTOCOLS[row.network].batch),
            teacher=fxmerge.trace(model, example(options, 2)) if options.method == "fxmerge" else None,
            recipe=recipe(PROTOCOLS[row.network], epochs, options.method),
            validation=data.validation(),
            checkpoints=options.out / "checkpoints",
            accelerator=accelerator,
            progress=bars("train"),
        )
    if not accelerator.is_main_process:
        return ""
    fxmerge.save_student(trained, loaded.plan, example(options, 2), options.out / "trained")
    return reported(row, model, loaded.model, fxmerge.fuse(trained), data, options, accelerator.device)


class Data:
    """The two folders, read as is usual for ImageNet."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET), v2.ToPureTensor()]
        seen = v2.Compose([v2.Resize(math.ceil(options.size * 256 / 224)), v2.CenterCrop(options.size), *finish])
        drawn = v2.Compose([v2.RandomResizedCrop(options.size), v2.RandomHorizontalFlip(), *finish])
        self.train = ImageFolder(str(options.data / "train"), transform=drawn)
        self.plain = ImageFolder(str(options.data / "train"), transform=seen)
        self.val = ImageFolder(str(options.data / "val"), transform=seen)

    def batches(self, processes: int, published: int) -> DataLoader[Any]:
        size = max(1, (self.options.batch or published) // processes)
        return DataLoader(self.train, size, shuffle=True, drop_last=True, num_workers=self.options.workers)

    def validation(self) -> DataLoader[Any]:
        return DataLoader(self.val, min(256, len(self.val)), num_workers=self.options.workers)

    def some(self, count: int, seed: int, batch: int) -> list[Any]:
        """(images, labels) from the training images, cropped at the centre."""
        order = torch.randperm(len(self.plain), generator=torch.Generator().manual_seed(seed))[:count]
        return list(DataLoader(Subset(self.plain, order.tolist()), batch, num_workers=self.options.workers))


def network(name: str, weights: Path | None) -> nn.Module:
    """torchvision's network with its pretrained weights, or those of a file; its last linear layer tells the classes."""
    if weights is None:
        made: nn.Module = torchvision.models.get_model(name, weights="DEFAULT")
        return made.eval()
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as fault:
        raise SystemExit(f"--weights must be a state dict in safetensors, and {weights} is none: {fault}") from fault
    made = torchvision.models.get_model(name, weights=None)
    *_, last = (layer for layer, module in made.named_modules() if isinstance(module, nn.Linear))
    if f"{last}.weight" not in state:
        raise SystemExit(f"--weights holds no {last}.weight: {weights} is of another network than {name}")
    made = torchvision.models.get_model(name, weights=None, num_classes=len(state[f"{last}.weight"]))
    made.load_state_dict(state)
    return made.eval()


def example(options: argparse.Namespace, batch: int) -> Tensor:
    return torch.randn(batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))


def compressed(model: nn.Module, row: Row, data: Data, options: argparse.Namespace, device: torch.device) -> None:
    """Compress to the row's speed-up, and leave the student, ready to be trained, with report and tables on disk."""
    options.out.mkdir(parents=True, exist_ok=True)
    images = torch.cat([images for images, _ in data.some(options.calibration, 0, 64)]).to(device)
    published = options.method == "layermerge"
    result = fxmerge.compress(
        copy.deepcopy(model).to(device),
        example(options, options.latency_batch).to(device),
        speedup=row.speedup,
        calibration=images,
        space="composed" if published else "joint",
        objective="layermerge" if published else "additive-loss",
        scorer=SCORER or (scorer(data, options, device) if published else None),
        timer=TIMER,
        store=options.out / "tables.db",
        trials=0 if published else TRIALS,
        progress=True,
    )
    result.save(options.out / "compressed")
    if published:  # layer by layer, nothing fitted
        student = fxmerge.linearize(fxmerge.annotate(result.findings.graph, result.plan))
    else:
        student = result.student_with_norms()
        calibrate_norms(student, [(part,) for part in images.split(64)])
    fxmerge.save_student(student, result.plan, example(options, 2), options.out / "start", report=result.report())
    write_json(options.out / "start.json", _settings(options))


def _settings(options: argparse.Namespace) -> dict[str, str]:
    """What decides the start."""
    names = ("row", "method", "weights", "calibration", "scorer_steps", "latency_batch", "size")
    return {name: str(getattr(options, name)) for name in names}


def _made(options: argparse.Namespace) -> bool:
    """Whether the start is there; SystemExit where it is one of other settings."""
    file = options.out / "start.json"
    other = [f"--{name.replace('_', '-')} {was}" for name, was in otherwise(file, _settings(options)).items()]
    if other:
        raise SystemExit(f"{options.out} holds what was made with {', '.join(other)}; give another --out")
    return file.exists()


def scorer(data: Data, options: argparse.Namespace, device: torch.device) -> fxmerge.FineTuning:
    """The published scorer, with a stated number of steps in place of an epoch."""
    train, holdout = (
        [(images.to(device), labels.to(device)) for images, labels in data.some(64 * steps, seed, 64)]
        for seed, steps in ((1, options.scorer_steps), (2, 16))
    )
    return fxmerge.FineTuning(train=train, holdout=holdout, steps=options.scorer_steps)


def recipe(protocol: Protocol, epochs: int, method: str) -> Recipe:
    """The published protocol; by our method with the teacher's part, and averaging."""
    ours = method == "fxmerge"
    return Recipe(
        epochs=epochs,
        learning_rate=protocol.learning_rate,
        warm_up=protocol.warm_up_epochs / protocol.epochs,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        loss=partial(F.cross_entropy, label_smoothing=protocol.label_smoothing),
        average=0.02 if ours else 0.0,
        distillation=Distillation(share=0.5, temperature=1.0, features=0.0),
    )


def reported(
    row: Row,
    model: nn.Module,
    untrained: nn.Module,
    trained: nn.Module,
    data: Data,
    options: argparse.Namespace,
    device: torch.device,
) -> str:
    """Accuracy and latency of all, and the published row; also as JSON in the folder."""
    graph = fxmerge.trace(model, example(options, 2))
    networks = {
        "original, folded": fxmerge.baseline(graph),
        "compressed, not trained": untrained,
        "compressed, trained": trained,
    }
    there = [fxmerge.Timed(each.to(device), (example(options, options.latency_batch).to(device),)) for each in networks.values()]
    timer: Callable[..., Sequence[fxmerge.Measurement]] = TIMER or fxmerge.compare
    measured = timer(there, target=fxmerge.Target(device=str(device)))
    rows: list[tuple[object, ...]] = []
    for (name, each), timing in zip(networks.items(), measured, strict=True):
        speedup = measured[0].median_ns / timing.median_ns
        rows.append((name, f"{accuracy(each, data, device):.2f}", f"{timing.median_ns / 1e6:.2f}", f"{speedup:.2f}x"))
    rows.append(("published: original", f"{row.original:.2f}", "", "1.00x"))
    rows.append(("published: compressed", f"{row.published:.2f}", "", f"{row.speedup:.2f}x"))
    settings = {name: str(value) for name, value in vars(options).items()}
    (options.out / "row.json").write_text(json.dumps({"rows": rows, "options": settings}, indent=1) + "\n", encoding="utf-8")
    report = tabulate(rows, ("network", "top-1", "ms a batch", "speed-up"), "github", disable_numparse=True)
    (options.out / "row.md").write_text(report + "\n", encoding="utf-8")
    return report


@torch.no_grad()
def accuracy(each: nn.Module, data: Data, device: torch.device) -> float:
    """Top-1 on all of val/, percent."""
    hits = [top1(each(images.to(device)), labels.to(device)).sum().item() for images, labels in data.validation()]
    return 100.0 * sum(hits) / len(data.val)


if __name__ == "__main__":
    main()
