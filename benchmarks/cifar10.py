"""CIFAR-10: what accuracy is left at a measured speed-up, without training and after some epochs, by each method.

    python -m benchmarks.cifar10 --network resnet20 --tables runs
    python -m benchmarks.cifar10 --network resnet20 --tables runs --methods fxmerge channels --regimes merged --seeds 0
    python -m benchmarks.cifar10 --network resnet20 --tables runs --rows fxmerge@1.3 layermerge@1.3
    python -m benchmarks.cifar10 --network resnet20 --tables runs --ablation

Every row is kept as it is found, in NETWORK.rows.jsonl in the folder --tables, beside the tables and the compressed networks: what
was interrupted goes on (training, too), and single rows can be run; the report is of all rows kept with these settings. Methods:

    fxmerge      all candidates, importance and weights in closed form
    composed     the published candidates (LayerMerge's), our importance and fit
    activations  depth compression's (activations only), our importance and fit
    layers       layers dropped whole, our importance and fit
    layermerge   LayerMerge as published: its candidates, its objective, importance by fine-tuning each candidate (--scorer-steps
                 steps of 64 images, 1,024 held out); weights as they multiply out, then trained
    channels     Torch-Pruning (extra `bench`): channels of least importance, wherever they are, as many as the speed-up asks for;
                 then, without training, norms with the statistics of the calibration images
    narrower     the architecture with fewer channels in all layers, trained from nothing

Regimes: `closed form` (or what else is had without a gradient step); `tuned`, by gradient steps on the same unlabelled images; and
trained, from one of two students: `merged` already, or layer by `layers` (left out where no merge is composed: they are the same).
All train on the same images, in the same order by seed, as long, with the same teacher. Speed-ups are measured end to end against
the original with its norms folded, in turn, on this machine's CPU, and are met to 3 %. Accuracy is on the test images of the JPEG
copy.

Needs ../shared (or FXMERGE_DATA and FXMERGE_WEIGHTS). mobilenet_v2 (stem of stride 1), and ResNets without weights there, are
trained first (benchmarks/pretraining.py), and kept in FXMERGE_CACHE.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.ablation import ablation
from benchmarks.contest import METHODS, REGIMES, Contest, regimes_of, told
from benchmarks.reports import deliver
from benchmarks.rivals import IMPORTANCES
from fxmerge.trials import TRIALS


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--network", default="resnet20", help="mobilenet_v2, or resnet and a depth of 6n + 2")
    made.add_argument("--tables", type=Path, help="a folder to keep tables, networks and rows in, or to take them from")
    made.add_argument("--out", type=Path, help="also write the report to this file")
    what = made.add_argument_group("which rows")
    what.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    what.add_argument("--speedups", type=float, nargs="+", default=[1.2, 1.3, 1.35, 1.5, 1.6, 2.0])
    what.add_argument("--rows", nargs="+", type=_row, metavar="METHOD@SPEEDUP", help="instead of all methods at all speed-ups")
    what.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    what.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    what.add_argument("--ours", action="store_true", help="fxmerge alone, without training")
    what.add_argument("--ablation", action="store_true", help="take the closed-form fit apart instead")
    how = made.add_argument_group("how")
    how.add_argument("--images", type=int, default=1024, help="calibration images, unlabelled, from the training split")
    how.add_argument("--trials", type=int, default=TRIALS, help="plans fitted before one is taken")
    how.add_argument("--groups", type=int, nargs="+", default=[], help="in which fitted kernels are offered as well; 0: depthwise")
    how.add_argument("--steps", type=int, default=400, help="gradient steps of calibration tuning; 0 leaves it out")
    how.add_argument("--epochs", type=int, default=3)
    how.add_argument("--batch", type=int, default=128, help="images a step of training")
    how.add_argument("--learning-rate", type=float, default=0.01)
    how.add_argument("--scratch-learning-rate", type=float, default=0.1, help="of what is trained from nothing")
    how.add_argument("--share", type=float, default=0.9, help="of the teacher's outputs in the loss; labels have the rest")
    how.add_argument("--temperature", type=float, default=4.0)
    how.add_argument("--features", type=float, default=1.0, help="weight of the teacher's tensors at the cuts")
    how.add_argument("--scorer-steps", type=int, default=50, help="of layermerge's scorer")
    how.add_argument("--importance", choices=IMPORTANCES, default="taylor", help="of channels")
    how.add_argument(
        "--round-to", type=int, nargs="+", default=[1, 4, 8], help="multiples of which channels stay; the best is taken"
    )
    how.add_argument("--pretrain-epochs", type=int, default=30, help="of a network without weights")
    how.add_argument("--latency-batch", type=int, default=128)
    how.add_argument("--train-images", type=int, help="so many only")
    how.add_argument("--test-images", type=int, help="so many only")
    return made


def main(arguments: Sequence[str] | None = None) -> str:
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        report = run(options, options.tables or Path(scratch))
    deliver(report, options.out)
    return report


def run(options: argparse.Namespace, folder: Path) -> str:
    """The rows asked for, those that are kept already included; the report as one Markdown text."""
    if options.ours:
        options.methods, options.regimes = ["fxmerge"], ["closed form", "tuned"]
    contest = Contest(options, folder)
    try:
        if options.ablation:
            return f"{_title(contest)}\n\n{ablation(contest)}"
        contest.original_top1()
        for method, asked in options.rows or _all(options):
            for regime in regimes_of(method):
                if regime not in options.regimes or (regime == "tuned" and not options.steps):
                    continue
                for seed in options.seeds if regime in ("merged", "layers") else options.seeds[:1]:
                    row = contest.row(method, asked, regime, seed)
                    if row is not None:
                        print(f"{method}@{asked:g} {regime} seed {seed}: {_short(row)}", flush=True)  # noqa: T201 - hours of work
        return "\n\n".join((_title(contest), _table(contest), _costs(contest)))
    finally:
        contest.close()


def _row(text: str) -> tuple[str, float]:
    method, _, asked = text.partition("@")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"{text} names no method; give one of {', '.join(METHODS)}, @, and a speed-up")
    return method, float(asked)


def _all(options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    for asked in options.speedups:
        for method in options.methods:
            yield method, asked


def _short(row: dict[str, Any]) -> str:
    if "top1" not in row:
        return f"cannot; fastest {row['fastest']:.2f}x"
    return f"{row['top1']:.2f} % at {row['speedup']:.2f}x, {row['seconds']:.0f} s"


def _table(contest: Contest) -> str:
    """All rows that were kept with the settings of today, medians over the seeds."""
    trained = f"{contest.options.epochs} epochs"
    heads = (
        "method",
        "asked",
        "measured",
        "convolutions",
        "parameters",
        "closed form",
        "tuned",
        f"{trained}, merged",
        f"{trained}, layers",
    )
    rows: list[tuple[object, ...]] = [("original, folded", "1.00", "1.00", "", "", f"{contest.original_top1():.2f}", "", "", "")]
    for asked in sorted({row["asked"] for row in contest.kept.rows if "asked" in row}):
        for method in METHODS:
            found = {regime: _kept(contest, method, asked, regime) for regime in REGIMES}
            some = next((each[0] for each in found.values() if each), None)
            if some is None:
                continue
            if "top1" not in some:
                rows.append((METHODS[method].label, f"{asked:.2f}", f"cannot; fastest {some['fastest']:.2f}", *[""] * 6))
                continue
            figures = f"{some['speedup']:.2f}", some["convolutions"], f"{some['parameters']:,}"
            rows.append((METHODS[method].label, f"{asked:.2f}", *figures, *map(_median, found.values())))
    return tabulate(rows, heads, "github", disable_numparse=True)


def _kept(contest: Contest, method: str, asked: float, regime: str) -> list[dict[str, Any]]:
    key = {name: value for name, value in contest.key(method, asked, regime, 0).items() if name != "seed"}
    return [row for row in contest.kept.rows if all(row.get(name) == value for name, value in key.items())]


def _median(rows: list[dict[str, Any]]) -> str:
    values = [row["top1"] for row in rows if "top1" in row]
    if not values:
        return ""
    spread = f" ({min(values):.2f} to {max(values):.2f}, {len(values)} seeds)" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{spread}"


def _title(contest: Contest) -> str:
    options = contest.options
    given = {action.dest: action for action in parser()._actions if action.option_strings}
    changed = [
        f"{action.option_strings[0]} {_plain(getattr(options, name))}".strip()
        for name, action in given.items()
        if name not in ("help", "tables", "out", "rows") and getattr(options, name) != action.default
    ]
    changed += [f"--rows {' '.join(f'{method}@{asked:g}' for method, asked in options.rows)}"] if options.rows else []
    command = " ".join(["python -m benchmarks.cifar10", *changed, *(["--tables DIR"] if options.tables else [])])
    where = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads, batch "
        f"{options.latency_batch}, float32, contiguous, eager"
    )
    training = "" if options.ablation else f"\n\nTraining: {told(contest.recipe('fxmerge', 0))}; from nothing with learning_rate "
    training += "" if options.ablation else f"{options.scratch_learning_rate}. Seeds {_plain(options.seeds)}; medians."
    return (
        f"# {contest.name}, CIFAR-10 (JPEG)\n\n`{command}`, {where}; {options.images} unlabelled calibration images; "
        f"{len(contest.test_labels)} test images; speed-ups against the folded original, timed in turn.{training}"
    )


def _plain(value: Any) -> str:
    return "" if value is True else shlex.join(map(str, value)) if isinstance(value, list) else str(value)


def _costs(contest: Contest) -> str:
    rows = [(stage, f"{seconds:.2f}") for stage, seconds in contest.costs.items()]
    return f"Seconds of this run:\n\n{tabulate(rows, ('stage', 'seconds'), 'github', disable_numparse=True)}"


if __name__ == "__main__":
    main()
