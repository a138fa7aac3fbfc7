"""The rows of the zoo as Markdown."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata

from benchmarks.zoo.blocks import Row
from benchmarks.zoo.check import PLAN_WEIGHTS, PLANS
from benchmarks.zoo.models import Entry


def status(row: Row) -> str:
    """``traced``, ``refused`` as a whole, ``not built`` (our fault), or ``failed``: a crash, too slow, or too large."""
    if row["stage"] in ("blocks", "law", "done"):
        return "traced"
    if row["stage"] in ("start", "build"):
        return "not built"
    return "refused" if row.get("refused") else "failed"


def law_text(row: Row) -> str:
    """``held`` for three plans, ``BROKEN`` for one, ``n/a`` without candidates; else ``raised`` or ``not finished``."""
    errors = row.get("errors", [])
    if any(error > row["tolerance"] for error in errors):
        return "BROKEN"
    if row["stage"] == "done":
        return "n/a" if not row["candidates"] else "held" if len(errors) == PLANS else "not finished"
    if row["stage"] == "law":
        return "raised" if "refused" in row and not row["memory"] else "not finished"
    return ""


def _residual(row: Row) -> bool:
    return row.get("residual_adds", 0) > 0 and not row["attention"]


def report(zoo: Sequence[Entry], stored: Mapping[str, Row]) -> Iterator[str]:
    """The whole report, part by part."""
    rows = [stored[entry.id] for entry in zoo if entry.id in stored]
    yield "# The zoo"
    yield _preamble(len(zoo), rows)
    yield _totals(rows)
    yield from _lists(rows)
    yield "## Residual CNNs\n\n" + _residual_text([row for row in rows if _residual(row)])
    yield "## Models\n\n" + _models(rows)
    yield "## Opaque operators\n\n" + _opaque(rows)


def _preamble(models: int, rows: Sequence[Row]) -> str:
    packages = ("torch", "torchvision", "timm", "diffusers", "segmentation_models_pytorch", "fxmerge")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    sources = ", ".join(f"{source} ({count} rows)" for source, count in Counter(row["source"] for row in rows).most_common())
    ends = ", ".join(f"{end} {count}" for end, count in Counter(r["front_end"] for r in rows if "front_end" in r).most_common())
    wall, cpu = _wall(rows) / 60, sum(row.get("cpu_seconds", 0.0) for row in rows) / 60
    trivial = sum(law_text(row) == "held" and not any(row["errors"]) for row in rows)
    large, candidates, shaky = (sum(row.get(key, 0) for row in rows) for key in ("too_large_to_draw", "candidates", "shaky"))
    return (
        f"`python -m benchmarks.zoo`, Python {platform.python_version()}, {versions}; one thread a model; fxmerge's source: "
        f"{sources}. {len(rows)} of {models} models run, in {wall:.0f} minutes ({cpu:.0f} of processor time). Front ends: {ends}. "
        f"The law was not tested on {large} of {candidates} candidates, of more than {PLAN_WEIGHTS / 1e6:.0f} M weights each; in "
        f"{trivial} models it holds with an error of exactly 0, for no plan drawn multiplied anything out; {shaky} plans were "
        "drawn again because their students overflow or are ill-conditioned (`benchmarks/zoo/check.py`). What is counted, and "
        "how, is told in `benchmarks/zoo/__main__.py`."
    )


def _wall(rows: Sequence[Row]) -> float:
    """Seconds during which any model was being run."""
    total = reached = 0.0
    for start, stop in sorted((row["began"], row["began"] + row["seconds"]) for row in rows):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def _totals(rows: Sequence[Row]) -> str:
    """One line for every zoo, and one for all."""
    zoos = list(dict.fromkeys(row["id"].partition(":")[0] for row in rows))
    lines = [_total(zoo, [row for row in rows if row["id"].partition(":")[0] == zoo]) for zoo in zoos]
    lines.append(_total("**all**", rows))
    whole = "torchvision detection, whole"
    lines.append(_total("**all but whole detectors**", [row for row in rows if not row["id"].startswith(whole)]))
    heads = ("zoo", "models", "traced", "refused", "failed", "not built", "law held", "broken", "raised", "not finished", "n/a")
    return _table((*heads, "worst float64", "worst float32", "residual CNNs", "block spanned"), lines)


def _total(name: str, rows: Sequence[Row]) -> tuple[object, ...]:
    states = Counter(map(status, rows))
    law = Counter(map(law_text, rows))
    residual = [row for row in rows if _residual(row)]
    return (
        name,
        len(rows),
        *(states[key] for key in ("traced", "refused", "failed", "not built")),
        *(law[key] for key in ("held", "BROKEN", "raised", "not finished", "n/a")),
        *(_worst([row for row in rows if row.get("dtype") == dtype]) for dtype in ("float64", "float32")),
        len(residual),
        _share(sum(row["spans_block"] for row in residual), len(residual)),
    )


def _worst(rows: Sequence[Row]) -> str:
    errors = [error for row in rows for error in row.get("errors", [])]
    return f"{max(errors):.1e}" if errors else ""


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f} %)" if whole else ""


def _lists(rows: Sequence[Row]) -> Iterator[str]:
    """What did not go well, model by model."""
    parts: tuple[tuple[str, Callable[[Row], bool], Callable[[Row], str]], ...] = (
        ("Refused as a whole", lambda r: status(r) == "refused", lambda r: r["fault"]),
        ("Failed", lambda r: status(r) == "failed", lambda r: f"{r['stage']}: {r['fault']}"),
        ("Not built", lambda r: status(r) == "not built", lambda r: r["fault"]),
        ("Law broken, raised or not finished", lambda r: law_text(r) in ("BROKEN", "raised", "not finished"), _law_fault),
        ("Convolutions or activations in no segment and no refusal", lambda r: bool(r.get("untold")), _untold),
    )
    for title, chosen, text in parts:
        lines = [f"- {row['id']}: {' '.join(text(row).split())}" for row in rows if chosen(row)]
        if lines:
            yield f"## {title}\n\n" + "\n".join(lines)


def _law_fault(row: Row) -> str:
    errors = ", ".join(f"{error:.1e}" for error in row.get("errors", []))
    shaky = f"; {row['shaky']} plans drawn again" if row.get("shaky") else ""
    return f"{law_text(row)}, errors [{errors}] {row.get('fault', '')}{shaky}"


def _untold(row: Row) -> str:
    return f"{len(row['untold'])}: {', '.join(row['untold'][:5])}"


def _residual_text(rows: Sequence[Row]) -> str:
    free = [row for row in rows if not row["gated"]]
    lines = [_spanned("residual CNNs", rows), _spanned("of these whose blocks hold no gate (product of two tensors)", free)]
    without = [row for row in rows if not row["spans_block"]]
    if without:
        clear = sum(not set(row["obstacles"]) - {"nothing opaque"} for row in without)
        lines.append(f"Of the {len(without)} without one, {len(without) - clear} have something opaque in their blocks.")
        lines.append("Without one, and what is opaque in how many of their blocks:")
        lines.append("\n".join(map(_obstructed, without)))
    return "\n\n".join(lines)


def _spanned(what: str, rows: Sequence[Row]) -> str:
    return (
        f"{len(rows)} {what}: {_share(sum(row['spans_block'] for row in rows), len(rows))} have a candidate that spans a residual "
        f"block; {sum(row['residual_adds_spanned'] for row in rows)} of their {sum(row['residual_adds'] for row in rows)} residual "
        "adds lie in one."
    )


def _obstructed(row: Row) -> str:
    found = ", ".join(f"{what} {count}" for what, count in row["obstacles"].items())
    return f"- {row['id']} ({row['residual_adds']} blocks): {found}"


def _models(rows: Sequence[Row]) -> str:
    heads = ["model", "pixels", "dtype", "M params", "front end", "nodes", "conv", "act", "segments", "candidates", "exact"]
    heads += ["refusals", "residual adds", "spanned", "law", "worst error", "composed / fitted / dropped", "compared on"]
    return _table([*heads, "s trace", "s find", "s law", "s all", "s CPU"], [_line(row) for row in rows])


def _line(row: Row) -> tuple[object, ...]:
    begun = (row["id"], row.get("size", ""), row.get("dtype", ""), f"{row.get('parameters', math.nan) / 1e6:.1f}")
    if status(row) != "traced":
        return (*begun, status(row), *[""] * 16, f"{row['seconds']:.1f}", f"{row.get('cpu_seconds', math.nan):.1f}")
    counts = [row[key] for key in ("nodes", "convolutions", "activations", "segments", "candidates", "exact")]
    by_reason: Counter[str] = Counter(row["refusals"])
    refusals = ", ".join(f"{reason} {count}" for reason, count in by_reason.most_common())
    kind = f"{row.get('residual_adds', '')}{' (attention)' if row.get('attention') else ''}"
    drawn = row.get("merges", {})
    found = row["seconds_find"] + row["seconds_propose"]
    seconds = (row["seconds_trace"], found, *(row.get(key, math.nan) for key in ("seconds_law", "seconds", "cpu_seconds")))
    return (
        *(*begun, row["front_end"], *counts, refusals, kind, row.get("residual_adds_spanned", "")),
        *(law_text(row), _worst([row]), " / ".join(str(drawn.get(kind, 0)) for kind in ("composed", "fitted", "identity"))),
        *(", ".join(row.get("compared", [])), *(f"{s:.1f}" for s in seconds)),
    )


def _opaque(rows: Sequence[Row]) -> str:
    occurrences: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        occurrences.update(row.get("opaque", {}))
        models.update(row.get("opaque", {}).keys())
    return _table(("operator", "refusals", "models"), [(what, n, models[what]) for what, n in occurrences.most_common()])
