"""The README's tables: of what is read, from the report of a run, and of the reasons for refusals; tests hold them together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fxmerge import Reason
from fxmerge.core.segment import ADVICE

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
REASON_HEADS = ("`Reason`", "why", "what would help")


def table(report: str) -> str:
    """The table, from the totals that the report begins with."""
    totals = _totals(report)
    lines: list[Sequence[object]] = []
    for name, zoos in ROWS.items():
        sums: Counter[str] = Counter()
        for zoo in zoos:
            sums.update(totals[zoo])
        tested = sums["law held"] + sums["broken"] + sums["raised"]
        law = f"{sums['law held']} of {tested}" if tested else ""
        residual = [sums["residual CNNs"], sums["block spanned"]] if sums["traced"] else ["", ""]
        lines.append([name, sums["models"], sums["traced"], law, *residual])
    return _markdown(HEADS, lines)


def reasons() -> str:
    """Every reason that a refusal may have, and what would help."""
    return _markdown(REASON_HEADS, [(f"`{reason.name}`", reason.value, ADVICE[reason]) for reason in Reason])


def put(readme: Path, report: str) -> None:
    """Write the tables in place of those that are there."""
    text = _found(HEADS).sub(lambda _: table(report), readme.read_text(encoding="utf-8"), count=1)
    readme.write_text(_found(REASON_HEADS).sub(lambda _: reasons(), text, count=1), encoding="utf-8")


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head, *body = [f"| {' | '.join(map(str, line))} |".replace("  ", " ") for line in (heads, *rows)]
    return "\n".join((head, "|---" * len(heads) + "|", *body))


def _found(heads: Sequence[str]) -> re.Pattern[str]:
    """A table with this head."""
    return re.compile(rf"\| {re.escape(heads[0])} \| {re.escape(heads[1])} [^\n]*(?:\n\|[^\n]*)*")


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
