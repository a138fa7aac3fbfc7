"""Our files on disk: written whole or not at all, and told when they are damaged."""

from __future__ import annotations

import csv
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fxmerge.errors import PlanError

T = TypeVar("T")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch file beside a file, of a name that no other writer has, which takes its place unless something goes wrong."""
    target = Path(path)
    scratch = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")  # a tempfile could be read by its owner only
    try:
        yield scratch
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Put a text on disk, whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """A value as JSON."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | os.PathLike[str], from_json: Callable[[object], T], again: str) -> T:
    """What :func:`write_json` wrote, made into an object.

    Args:
        path: of the file.
        from_json: what makes it; raises PlanError where it cannot.
        again: what to do if the file cannot be used.

    Raises:
        PlanError: the file is not JSON, or not what is wanted.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as fault:  # of a number of over 4300 digits Python says no more than ValueError
        raise PlanError(f"{path} is damaged: it is not JSON ({fault}). {again}") from fault
    try:
        return from_json(value)
    except PlanError as fault:
        raise PlanError(f"{path} cannot be used: {fault}. {again}") from fault


def write_csv(path: str | os.PathLike[str], heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table with a line of heads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    write_whole(path, text.getvalue())
