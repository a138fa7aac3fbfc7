"""The README's table of what is read, made from the report of a run; a test holds the two together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Row of the README -> zoos of the report that it sums up.
ROWS: Mapping[str, Sequence[str]] = {
    "torchvision: classification, segmentation, backbones, video": (
        "torchvision",
        "torchvision segmentation",
        "torchvision detection, backbone",
        "torchvision video",
        "torchvision quantizable",
    ),
    "torchvision: whole detectors": ("torchvision detection, whole",),
    "timm": ("timm", "timm, patches only"),
    "segmentation_models_pytorch": ("segmentation_models_pytorch",),
    "diffusers": ("diffusers",),
}
HEADS = ("zoo", "networks", "read", "student = merged network", "residual CNNs", "with a candidate over a whole block")


def table(report: str) -> str:
    """The table, from the totals that the report begins with."""
    totals = _totals(report)
    lines: list[Sequence[object]] = [HEADS]
    for name, zoos in ROWS.items():
        sums: Counter[str] = Counter()
        for zoo in zoos:
            sums.update(totals[zoo])
        tested = sums["law held"] + sums["broken"] + sums["raised"]
        law = f"{sums['law held']} of {tested}" if tested else ""
        residual = [sums["residual CNNs"], sums["block spanned"]] if sums["traced"] else ["", ""]
        lines.append([name, sums["models"], sums["traced"], law, *residual])
    head, *body = [f"| {' | '.join(map(str, line))} |".replace("  ", " ") for line in lines]
    return "\n".join((head, "|---" * len(HEADS) + "|", *body))


def put(readme: Path, report: str) -> None:
    """Write the table in place of the one that is there."""
    text = readme.read_text(encoding="utf-8")
    readme.write_text(_TABLE.sub(lambda _: table(report), text, count=1), encoding="utf-8")


_TABLE = re.compile(rf"\| {re.escape(HEADS[0])} \| {re.escape(HEADS[1])}[^\n]*(?:\n\|[^\n]*)*")


def _totals(report: str) -> dict[str, Counter[str]]:
    """Zoo -> its numbers by column."""
    lines = [line.strip("| ").split("|") for line in report.splitlines() if line.startswith("| ")]
    heads = [cell.strip() for cell in lines[0]]
    found: dict[str, Counter[str]] = {}
    for cells in lines[2:]:
        name, *numbers = (cell.strip() for cell in cells)
        if name.startswith("**"):
            break
        counts = ((head, _WHOLE.match(cell)) for head, cell in zip(heads[1:], numbers, strict=False))
        found[name] = Counter({head: int(match[0]) for head, match in counts if match})
    return found


_WHOLE = re.compile(r"\d+(?![\d.e])")
