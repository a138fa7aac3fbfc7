"""Rows of a CSV file somebody else wrote; whatever is wrong with one is told by file, line and column."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from fxmerge.errors import TableError

_DIGITS = 18  # whole numbers of more are nobody's


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a file, by column."""

    path: str
    line: int
    cells: Mapping[str, str]

    def fault(self, column: str, text: str) -> TableError:
        """What is wrong with a column, as an error to raise."""
        return TableError(f"{self.path}, line {self.line}, column {column}: {text}", path=self.path, line=self.line, column=column)

    def read(self, column: str, convert: Callable[[str], Any], what: str) -> Any:
        """A column, converted; ``what`` says what it should be."""
        text = self.cells[column]
        try:
            return convert(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as cause:
            raise self.fault(column, f"expected {what}, found {text!r:.80}") from cause

    def stretch(self) -> tuple[int, int]:
        """Where the row starts and ends."""
        st, end = (self.read(name, natural, "a whole number from 0 on") for name in ("st", "end"))
        if end <= st:
            raise self.fault("end", f"a stretch from {st} ends behind it, found {end}")
        return st, end

    def nanoseconds(self) -> int:
        """Its time, which is in milliseconds, rounded up."""
        milliseconds = self.read("time", _amount, "milliseconds, finite and from 0 on")
        return math.ceil(Decimal(repr(milliseconds)) * 1_000_000)  # 1.234567 * 1e6 > 1234567


def rows(path: str | os.PathLike[str], columns: Sequence[str], advice: str = "") -> Iterator[Row]:
    """The rows of a file, which must have these columns; ``advice`` is for the case that it has not.

    Raises:
        TableError: it is no such file.
        OSError: it cannot be read.
    """
    path = os.fspath(path)
    line = 1
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            heads = list(reader.fieldnames or ())
            missing = [name for name in columns if name not in heads]
            if missing:
                text = f"no such column; found {', '.join(heads) or 'nothing'}{advice}"
                raise TableError(f"{path}, line 1, column {missing[0]}: {text}", path=path, line=1, column=missing[0])
            again = [name for name in columns if heads.count(name) > 1]
            if again:
                text = "there are two columns of this name"
                raise TableError(f"{path}, line 1, column {again[0]}: {text}", path=path, line=1, column=again[0])
            for cells in reader:
                line = reader.line_num
                short = next((name for name in columns if cells[name] is None), None)
                if short is not None or None in cells:
                    text = "the line ends before it" if short is not None else "the line goes on behind the last column"
                    column = short or list(cells)[-2]
                    raise TableError(f"{path}, line {line}, column {column}: {text}", path=path, line=line, column=column)
                yield Row(path, line, cells)
    except (csv.Error, UnicodeDecodeError) as fault:
        raise TableError(f"{path}, after line {line}: it is not CSV in UTF-8 ({fault})", path=path, line=line, column="") from fault


def natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise ValueError
    return int(text)


def truth(text: str) -> bool:
    if text not in ("True", "1", "False", "0"):
        raise ValueError
    return text in ("True", "1")


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value
