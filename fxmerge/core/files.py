"""Our files on disk: written whole or not at all, and told when they are damaged."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fxmerge.errors import PlanError


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Put a text on disk, whole or not at all."""
    target = Path(path)
    scratch = target.with_name(target.name + ".part")
    scratch.write_text(text, encoding="utf-8", newline="")
    scratch.replace(target)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """A value as JSON."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | os.PathLike[str], again: str) -> Any:
    """A value that :func:`write_json` wrote.

    Raises:
        PlanError: the file is not JSON; ``again`` says what to do.
        OSError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise PlanError(f"{path} is damaged: it is not JSON ({fault}). {again}") from fault


def write_csv(path: str | os.PathLike[str], heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table with a line of heads."""
    target = Path(path)
    scratch = target.with_name(target.name + ".part")
    with scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(heads)
        writer.writerows(rows)
    scratch.replace(target)
