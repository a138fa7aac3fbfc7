"""The same verbs from a shell: ``fxmerge inspect``, ``compress``, ``measure``, ``solve``, ``front``, ``demo``."""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tabulate import tabulate
from torch import Tensor, nn

import fxmerge
from fxmerge.analysis.plot import plot_front
from fxmerge.budget import budget_ns
from fxmerge.data import in_a_line, read_images
from fxmerge.errors import FxMergeError, InputError
from fxmerge.measure.progress import Bars
from fxmerge.measure.store import opened
from fxmerge.measure.study import Study, Trial
from fxmerge.quick_noise import QuickNoise
from fxmerge.survey import survey


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 refused with a message, 130 interrupted."""
    options = _parser().parse_args(argv)
    gc.freeze()  # what was imported stays: collections need not walk over it each time
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        options.run(options)
    except FxMergeError as refusal:
        print(f"fxmerge: {type(refusal).__name__}: {refusal}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as fault:
        print(f"fxmerge: {fault}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("fxmerge: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    finally:
        gc.unfreeze()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxmerge", description=(fxmerge.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=fxmerge.__version__)
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    inspect = verbs.add_parser("inspect", help="print nodes, segments, candidates and refusals of a model")
    _model_options(inspect, batch=2)
    inspect.set_defaults(run=_inspect)

    compress = verbs.add_parser("compress", help="compress a model to a latency budget")
    _model_options(compress)
    _measuring_options(compress)
    compress.add_argument("--speedup", type=float, help="how many times faster than the folded original")
    compress.add_argument("--fraction", type=float, help="or: which part of its latency may remain")
    compress.add_argument("--latency-ms", type=float, help="or: milliseconds")
    compress.add_argument("--exact", action="store_true", help="keep the function; needs no data and no budget")
    compress.add_argument("--out", required=True, type=Path, help="directory to write plan, weights and report to")
    compress.set_defaults(run=_compress)

    measure = verbs.add_parser("measure", help="measure all candidates of a model into a store; run again, it goes on")
    _model_options(measure)
    _measuring_options(measure)
    measure.set_defaults(run=_measure, exact=False)

    solve = verbs.add_parser("solve", help="make a plan from a store, without the model")
    _store_options(solve)
    solve.add_argument("--budget", required=True, help="1.5x (faster), 60%% (of the latency), or 12.5ms")
    solve.add_argument("--out", type=Path, help="file to write the plan to (JSON)")
    solve.set_defaults(run=_solve)

    front = verbs.add_parser("front", help="print or draw every plan worth having of a store, and what was measured")
    _store_options(front)
    front.add_argument("--budget", help="mark the plan for this budget, as for solve")
    front.add_argument("--plot", type=Path, help="picture to draw: .png, .svg or .pdf (needs matplotlib)")
    front.set_defaults(run=_front)

    demo = verbs.add_parser("demo", help="train, compress and fine-tune a small network on real handwritten digits")
    demo.add_argument("--out", type=Path, default=Path("fxmerge-demo"), help="directory to write to (default %(default)s)")
    demo.add_argument("--speedup", type=float, default=1.5)
    demo.set_defaults(run=_demo)
    return parser


def _model_options(parser: argparse.ArgumentParser, *, batch: int = 8) -> None:
    parser.add_argument("model", metavar="MODEL", help="package.module:factory, or torchvision:NAME")
    parser.add_argument("--weights", type=Path, help="a state dict (.safetensors, or .pt that holds tensors only)")
    parser.add_argument("--size", type=int, nargs="+", default=[224], help="image height and width (default 224)")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=batch, help="batch size to run it at (default %(default)s)")


def _measuring_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="an ImageFolder directory, or NAME:ROOT of a torchvision data set on disk (CIFAR10:/data)")
    parser.add_argument("--mean", type=float, nargs="+", help="subtracted from images in 0..1 (default: ImageNet's)")
    parser.add_argument("--std", type=float, nargs="+", help="... which are divided by this")
    parser.add_argument("--images", type=int, default=512, help="calibration images to take (default %(default)s)")
    parser.add_argument("--space", default="joint", choices=("joint", "composed", "activations", "layers"))
    parser.add_argument("--store", type=Path, required=parser.prog.endswith("measure"), help="file that keeps every measurement")
    parser.add_argument("--executor", default="local", choices=("local", "processes", "ray"), help="where importance is measured")
    parser.add_argument("--workers", type=int, default=2, help="how many processes (default %(default)s)")


def _store_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", type=Path, help="file filled by measure, or by compress --store")
    parser.add_argument("--study", type=int, help="which of the networks in it (default: the latest)")
    parser.add_argument("--space", default="joint", choices=("joint", "activations", "layers"))
    parser.add_argument("--objective", default="additive-loss", choices=("additive-loss", "layermerge"))


def _inspect(options: argparse.Namespace) -> None:
    _check_numbers(options)
    with QuickNoise():
        model = _load_model(options)
    graph = fxmerge.trace(model, _example(options))
    print(fxmerge.explain(fxmerge.find_segments(graph)))  # noqa: T201


def _compress(options: argparse.Namespace) -> None:
    model, example, measuring = _measuring(options)
    _make_folder(options.out)
    budget = {"speedup": options.speedup, "fraction": options.fraction, "latency_ms": options.latency_ms}
    result = fxmerge.compress(model, example, **measuring, **budget, exact=options.exact, progress=True)
    result.save(options.out)
    print(result.report())  # noqa: T201


def _measure(options: argparse.Namespace) -> None:
    model, example, measuring = _measuring(options)
    with opened(measuring.pop("store")) as store, Bars(True) as bars:
        found = survey(model, example, **measuring, store=store, bars=bars)
    print(fxmerge.explain(found.study.front()))  # noqa: T201


def _measuring(options: argparse.Namespace) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """What both verbs that measure give on: the model, example inputs, and options."""
    if options.data is None and not options.exact:
        raise InputError("give --data (unlabelled images to calibrate on)" + (", or --exact" if "speedup" in options else ""))
    _check_numbers(options)
    model = _load_model(options)
    images = None if options.exact else _images(options)
    example = _example(options) if images is None else images[torch.arange(options.batch) % len(images)]
    executor = fxmerge.Processes(workers=options.workers) if options.executor == "processes" else options.executor
    return model, example, {"calibration": images, "space": options.space, "store": options.store, "executor": executor}


def _solve(options: argparse.Namespace) -> None:
    study, front, _ = _read(options)
    plan = front.pick(budget_ns(options.budget, front.original_ns))
    if options.out is not None:
        plan.save(options.out)
    print(fxmerge.explain(plan, latency=study.latency, importance=study.importance))  # noqa: T201


def _front(options: argparse.Namespace) -> None:
    study, front, trials = _read(options)
    plan = front.pick(budget_ns(options.budget, front.original_ns)) if options.budget is not None else None
    if options.plot is not None:
        # A trial's latency is shown relative to the original timed beside it: the machine may have been slower that day.
        same = [trial for trial in trials if trial.plan.objective == front.objective]
        scaled = [(t.merged.median_ns * front.original_ns // t.original.median_ns, t.plan.loss) for t in same]
        plot_front(front, options.plot, picked=plan or (), measured=scaled, title=study.name)
    print(fxmerge.explain(front))  # noqa: T201
    if trials:
        print(f"\n{_trials(trials)}")  # noqa: T201


def _read(options: argparse.Namespace) -> tuple[Study, fxmerge.ParetoFront, list[Trial]]:
    with fxmerge.Store(options.store, read_only=True) as store:
        study, trials = store.study(options.study), store.trials(options.study)
    return study, study.front(space=options.space, objective=options.objective), trials


def _trials(trials: Sequence[Trial]) -> str:
    rows = [
        (
            f"{(t.plan.latency_ns or 0) / 1e6:.3f}",
            f"{t.merged.median_ns / 1e6:.3f} +- {t.merged.spread_ns / 2e6:.3f}",
            f"{t.original.median_ns / 1e6:.3f} +- {t.original.spread_ns / 2e6:.3f}",
            f"{t.original.median_ns / t.merged.median_ns:.3f}x",
        )
        for t in trials
    ]
    return "Measured end to end\n" + tabulate(
        rows, headers=("predicted ms", "ms", "original ms", "speed-up"), disable_numparse=True
    )


def _demo(options: argparse.Namespace) -> None:
    from fxmerge.demo import run_demo

    _make_folder(options.out)
    print(run_demo(options.out, speedup=options.speedup))  # noqa: T201


def _check_numbers(options: argparse.Namespace) -> None:
    if len(options.size) > 2 or min(options.size) < 1:
        raise InputError(f"--size takes one or two positive numbers, found {' '.join(map(str, options.size))}")
    for name in ("batch", "channels", "images", "workers"):
        value = getattr(options, name, 1)
        if value < 1:
            raise InputError(f"--{name} takes a positive number, found {value}")


def _make_folder(out: Path) -> None:
    """Before the work, so that what cannot be written to is told before it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as fault:
        raise InputError(f"--out {out} is no directory that can be written to: {fault.strerror}") from fault


def _size(options: argparse.Namespace) -> tuple[int, int]:
    """Height and width."""
    return options.size[0], options.size[-1]


def _example(options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(options.batch, options.channels, *_size(options), generator=generator)


def _images(options: argparse.Namespace) -> Tensor:
    size, channels = _size(options), options.channels
    return read_images(options.data, count=options.images, size=size, channels=channels, mean=options.mean, std=options.std)


def _load_model(options: argparse.Namespace) -> nn.Module:
    model = _made(options.model)
    if options.weights is not None:
        try:
            model.load_state_dict(_state(options.weights))
        except RuntimeError as fault:
            raise InputError(f"{options.weights} does not fit {options.model}: {str(fault).splitlines()[-1].strip()}") from fault
    return model.eval()


def _made(name: str) -> nn.Module:
    module, _, factory = name.partition(":")
    if not factory:
        raise InputError(f"MODEL is package.module:factory or torchvision:NAME, found {name!r}")
    sys.path.insert(0, "")  # as `python -m` does: the user's own module, in the current directory
    try:
        if module == "torchvision":
            from torchvision.models import get_model

            made = get_model(factory, weights=None)
        else:
            made = getattr(importlib.import_module(module), factory)()
    except Exception as fault:  # a factory is other people's code, and raises anything
        raise InputError(f"cannot make {name}: {in_a_line(fault)}") from fault
    finally:
        sys.path.remove("")
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} made a {type(made).__name__}, not a torch.nn.Module")
    return made


def _state(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise InputError(f"no such file: {path}")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # what torch.load raises depends on where the file is damaged
        raise InputError(f"{path} is not a state dict of tensors: {in_a_line(fault)}") from fault
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} is not a state dict of tensors: it holds a {type(state).__name__}")
    return dict(state)


if __name__ == "__main__":
    sys.exit(main())
