"""The front as a picture: what can be had for which latency, what was picked, what was measured. Needs the extra ``plot``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.errors import InputError

_LOSS = {"additive-loss": "loss (sum over merges)", "layermerge": "layers less the sum of exp(change)"}


def plot_front(
    front: ParetoFront,
    path: str | os.PathLike[str],
    *,
    picked: Plan | Sequence[Plan] = (),
    measured: Sequence[tuple[int, float]] = (),
    title: str = "",
) -> None:
    """Draw a front into a file: loss over latency, with the picked plans, the original, and what was measured.

    Args:
        front: with or without a second resource; its amounts become colours.
        path: the file; its ending says the format (png, svg, pdf).
        picked: plans to mark.
        measured: (latency in nanoseconds, loss) of merged networks that were run.
        title: of the picture.

    Raises:
        InputError: matplotlib is not installed, or does not write such files; or something given is of another kind.
        OSError: the file cannot be written.
    """
    plans, points = _check(front, picked, measured)
    if not isinstance(path, (str, os.PathLike)) or not isinstance(title, str):
        raise InputError(f"path must be that of a file, title a text; found {path!r:.80}, {title!r:.80}")
    if not Path(path).suffix or Path(path).is_dir():
        raise InputError(f"cannot draw into {os.fspath(path)!r}: give a file that ends in .png, .svg or .pdf")
    figure_type, canvas_type = _matplotlib()
    figure = figure_type(figsize=(7.0, 4.5), layout="constrained")
    canvas_type(figure)
    axes = figure.subplots()
    _draw_front(figure, axes, front)
    axes.plot([front.original_ns / 1e6], [0.0], "k*", markersize=12, label="original, folded")
    if plans:
        at = [(plan.latency_ns or 0) / 1e6 for plan in plans]
        axes.plot(at, [plan.loss for plan in plans], "o", mfc="none", mec="C3", markersize=10, label="picked")
    if points:
        axes.plot([ns / 1e6 for ns, _ in points], [loss for _, loss in points], "x", color="C2", markersize=8, label="measured")
    axes.set(xlabel="latency, ms", ylabel=_LOSS.get(front.objective, "loss"), title=title)
    axes.secondary_xaxis("top", functions=(_speedup(front), _speedup(front))).set_xlabel("speed-up")
    axes.legend()
    try:
        figure.savefig(path, dpi=144)
    except ValueError as fault:
        raise InputError(f"cannot draw into {os.fspath(path)}: {fault}. End it in .png, .svg or .pdf.") from fault


def _check(front: Any, picked: Any, measured: Any) -> tuple[list[Plan], list[tuple[float, float]]]:
    """The plans that have a latency, and what was measured."""
    if not isinstance(front, ParetoFront):
        raise InputError(f"front must be a ParetoFront, such as solve() gives, found {front!r:.80}")
    plans = [picked] if isinstance(picked, Plan) else picked
    if not isinstance(plans, Sequence) or not all(isinstance(plan, Plan) for plan in plans):
        raise InputError(f"picked must be a Plan or a sequence of them, found {picked!r:.80}")
    try:
        points = [(float(ns), float(loss)) for ns, loss in measured]
    except (TypeError, ValueError) as fault:
        raise InputError(f"measured must be pairs (nanoseconds, loss), found {measured!r:.80}") from fault
    return [plan for plan in plans if plan.latency_ns is not None], points


def _draw_front(figure: Any, axes: Any, front: ParetoFront) -> None:
    at = [ns / 1e6 for ns in front.latencies_ns]
    if front.second:
        dots = axes.scatter(at, front.losses, c=front.amounts, s=12, label=f"{len(front)} plans")
        figure.colorbar(dots, ax=axes, label=front.second)
    else:
        axes.step(at, front.losses, where="post", marker=".", label=f"{len(front)} plans")


def _speedup(front: ParetoFront) -> Any:
    """Milliseconds to speed-up and back; both are the same function."""

    def turned(values: Any) -> Any:
        import numpy as np

        return front.original_ns / 1e6 / np.maximum(values, 1e-9)

    return turned


def _matplotlib() -> tuple[Any, Any]:
    """What draws into files, without a display and without the global state of pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as fault:
        raise InputError("plots need matplotlib: pip install 'fxmerge[plot]'") from fault
    return Figure, FigureCanvasAgg
