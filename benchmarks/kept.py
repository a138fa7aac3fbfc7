"""Rows of a benchmark on disk, one JSON object a line: a run that was interrupted goes on, and single rows can be run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Kept:
    """The rows in a file; none is written twice.

    Args:
        path: of the file; made with the first row. A line that was half written when a run was killed is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
        self.rows: list[dict[str, Any]] = [row for line in lines if (row := _read(line)) is not None]

    def found(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row with all these values, if it is there."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(row) + "\n")
        self.rows.append(dict(row))


def _read(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def otherwise(file: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of settings, a JSON object, says otherwise than they are now; nothing where there is no such file.

    A setting that it does not know counts as empty: it was not there to be given.
    """
    if not file.exists():
        return {}
    was = json.loads(file.read_text(encoding="utf-8"))
    return {name: was.get(name) for name in now if was.get(name) != now[name] and (name in was or now[name])}
