"""The main job on real data that needs no download: a small residual network on scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.compress import compress
from fxmerge.errors import InputError
from fxmerge.measure.cost import cost
from fxmerge.measure.progress import Bars
from fxmerge.measure.timer import Timed, Timer, compare
from fxmerge.passes.fuse_segments import fuse
from fxmerge.result import Result
from fxmerge.saved import save_student
from fxmerge.trials import TRIALS
from fxmerge.tune import Recipe, calibrate_norms, fine_tune

#: Images of the test split; the other 1,347 are for training, and the first 512 of them, without labels, for calibration.
_TEST = 450
_CALIBRATION = 512
_BATCH = 64
_TRAIN_EPOCHS = 20
_TUNE_EPOCHS = 15


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a projection where size or width changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


def digits_network(width: int = 32) -> nn.Sequential:
    """A residual network for 1 x 8 x 8 images of ten classes: two stages of three blocks, the second strided."""
    stages: list[nn.Module] = [nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    stages += [_Block(width, width, 1) for _ in range(3)]
    stages += [_Block(width, 2 * width, 2), _Block(2 * width, 2 * width, 1), _Block(2 * width, 2 * width, 1)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels: real handwritten digits, (N, 1, 8, 8) in 0..1.

    Raises:
        InputError: scikit-learn, which ships them, is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as fault:
        raise InputError("the demo's digits come with scikit-learn: pip install 'fxmerge[demo]'") from fault
    data = load()
    split = train_test_split(data.images, data.target, test_size=_TEST, random_state=0, stratify=data.target)
    train_x, test_x = (torch.from_numpy(images).float().unsqueeze(1) / 16 for images in split[:2])
    train_y, test_y = (torch.from_numpy(labels).long() for labels in split[2:])
    return train_x, train_y, test_x, test_y


def run_demo(
    out: Path,
    *,
    speedup: float = 1.5,
    epochs: tuple[int, int] = (_TRAIN_EPOCHS, _TUNE_EPOCHS),
    trials: int = TRIALS,
    timer: Timer | None = None,
    progress: bool = True,
) -> str:
    """Train, compress without training, fine-tune, compare; leave plan, weights and report in a folder.

    Args:
        out: directory to write to.
        speedup: the budget.
        epochs: of training the original, and of fine-tuning.
        trials: plans near the budget that are fitted whole.
        timer: what measures latency; None for the clock.
        progress: show bars on standard error.

    Returns:
        The report: one table, and the predicted beside the measured latency.
    """
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = load_digits()
    data = _shuffled(train_x, train_y)
    with Bars(progress) as bars:
        original = _trained(digits_network(), data, epochs[0], bars("train"))
    calibration = train_x[:_CALIBRATION]
    result = compress(
        original, test_x[:128], speedup=speedup, calibration=calibration, trials=trials, timer=timer, progress=progress
    )
    student, merged = _tuned(result, data, calibration, epochs[1], progress)
    report = _report(result, merged, test_x, test_y, timer)
    save_student(student, result.plan, result.example_inputs, out, report=report)
    return f"{report}\n\nplan, weights and report are in {out}"


def _shuffled(images: Tensor, labels: Tensor) -> Callable[[int], Iterable[tuple[Tensor, Tensor]]]:
    """From the number of an epoch to its batches, in an order of its own."""

    def epoch(number: int) -> Iterable[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(images), generator=torch.Generator().manual_seed(number)).split(_BATCH):
            yield images[index], labels[index]

    return epoch


def _trained(network: nn.Module, data: Any, epochs: int, progress: Callable[[int, int], None]) -> nn.Module:
    steps = sum(1 for _ in data(0))
    optimiser = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps * epochs + 1)
    network.train()
    for epoch in range(epochs):
        for images, labels in data(epoch):
            loss = nn.functional.cross_entropy(network(images), labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        progress(epoch + 1, epochs)
    return network.eval()


def _tuned(result: Result, data: Any, calibration: Tensor, epochs: int, progress: bool) -> tuple[GraphModule, GraphModule]:
    """The student with norms behind its fitted convolutions, trained briefly, and merged again."""
    fitted = result.student_with_norms()
    calibrate_norms(fitted, [(calibration,)])
    recipe = Recipe(epochs=epochs, learning_rate=0.002)
    with Bars(progress) as bars:
        student = fine_tune(fitted, data, teacher=result.findings.graph, recipe=recipe, progress=bars("fine-tune"))
    return student, fuse(student)


def _report(result: Result, tuned: GraphModule, test_x: Tensor, test_y: Tensor, timer: Timer | None) -> str:
    networks = {
        "original, batch norms folded": result.baseline,
        "compressed, no training": result.model,
        "compressed, fine-tuned": tuned,
    }
    inputs = result.example_inputs
    measured = (timer or compare)([Timed(network, inputs) for network in networks.values()], target=result.measured[0].target)
    rows = []
    for (name, network), timing in zip(networks.items(), measured, strict=True):
        figures = cost(network, inputs)
        rows.append(
            (
                name,
                f"{accuracy(network, test_x, test_y):.2f} %",
                f"{timing.median_ns / 1e6:.2f} +- {timing.spread_ns / 2e6:.2f}",
                f"{measured[0].median_ns / timing.median_ns:.2f}x",
                figures.convolutions,
                figures.activations,
                f"{figures.parameters:,}",
                f"{figures.flops / len(inputs[0]) / 1e6:.2f} M",
            )
        )
    heads = ("network", "test accuracy", "ms a batch", "speed-up", "convolutions", "activations", "parameters", "FLOPs an image")
    return "\n\n".join(
        (
            tabulate(rows, headers=heads, disable_numparse=True),
            f"latency: predicted {result.predicted_speedup:.2f}x by the tables, measured {result.speedup:.2f}x "
            f"(batch of {len(inputs[0])}, {result.measured[0].target})",
            f"{len(test_x)} test images that no step has seen; one of them is {100 / len(test_x):.2f} %",
        )
    )


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of images (N, 1, 8, 8) whose largest logit is their label."""
    with torch.no_grad():
        hits = network(images).argmax(1) == labels
    return 100.0 * float(hits.float().mean())
