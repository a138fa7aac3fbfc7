"""A SQLite file of ours: opened, recognised, written in transactions; every fault is told with the file and what to do."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fxmerge.errors import StoreError

_APPLICATION = 0x66786D67  # "fxmg", in the header of the file
_MAGIC = b"SQLite format 3\0"
_ADVICE: Mapping[str, str] = {
    "disk is full": ". What was written before is safe: make room and run the same again",
    "readonly": ". The file or its folder cannot be written to: give another place",
    "unable to open": ". The file or its folder cannot be read or written: check its permissions",
    "locked": ". Another process has been writing for longer than patience_s: try again when it is done",
    "not a database": ". Give the name of a store, or of a file that is not there yet",
    "Could not decode": ". The file is damaged: measure again into another one",
    "malformed": ". The file is damaged: measure again into another one",
    "disk I/O": ". Give a file on a local disk: network file systems cannot share it",
}


class Database:
    """A file with these tables.

    Args:
        path: made if it is not there, in a folder that is.
        schema: statements that make the tables of an empty file.
        version: of the schema; a file of another one is refused.
        read_only: only look; the file must be there.
        patience_s: how long to wait for another process that is writing.

    Raises (when made and by every method):
        StoreError: the file cannot be opened, read or written, or is another program's; nothing in it is changed then.
    """

    def __init__(
        self, path: str | os.PathLike[str], schema: str, version: int, *, read_only: bool = False, patience_s: float = 60.0
    ) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._schema, self._version = schema, version
        with self._blame():
            self._connection = self._open(patience_s)
        try:
            with self._blame():
                self._check()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows that a query finds."""
        with self._blame():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it or nothing."""
        with self._blame():
            if self.read_only:
                raise StoreError(f"{self.path} was opened to be read only", path=str(self.path))
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def row(self, table: str, name: str, **key: str) -> Iterator[None]:
        """A fault in a row, told as that of this row; it stays where it is, as do all others."""
        try:
            yield
        except ValueError as fault:
            where = ", ".join(f"{column} {value}" for column, value in key.items())
            raise StoreError(
                f"{self.path} is damaged: table {table}, the row of {name!r:.80} ({where}): {fault}. Delete that row, or measure "
                "again into another file; the other rows are as they were.",
                path=str(self.path),
            ) from fault

    def mapping(self, text: str) -> dict[str, Any]:
        """A JSON object in a cell."""
        try:
            value = json.loads(text)
        except (TypeError, ValueError, RecursionError) as fault:
            raise StoreError(f"{self.path} is damaged: {fault}. Measure again into another file.", path=str(self.path)) from fault
        if not isinstance(value, dict):
            raise StoreError(
                f"{self.path} is damaged: expected an object, found {text!r:.80}. Measure again into another file.",
                path=str(self.path),
            )
        return value

    def _open(self, patience_s: float) -> sqlite3.Connection:
        if not self.path.parent.is_dir():
            raise StoreError(f"no folder {self.path.parent} to keep {self.path.name} in", path=str(self.path))
        if self.path.is_dir():
            raise StoreError(f"{self.path} is a folder; give the name of a file", path=str(self.path))
        self._refuse_strangers()
        if not self.read_only:
            return sqlite3.connect(self.path, timeout=patience_s, isolation_level=None)
        if not self.path.exists():
            raise StoreError(f"no such file: {self.path}", path=str(self.path))
        uri = f"{self.path.resolve().as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, timeout=patience_s, isolation_level=None, uri=True)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            # In a folder that cannot be written to, a file without a log beside it opens only as one that nobody changes.
            connection.close()
            if self.path.with_name(self.path.name + "-wal").exists():
                raise
            connection = sqlite3.connect(f"{uri}&immutable=1", timeout=patience_s, isolation_level=None, uri=True)
        return connection

    def _refuse_strangers(self) -> None:
        """SQLite takes a file of a few bytes for an empty one, and would write over it."""
        try:
            with self.path.open("rb") as file:
                head = file.read(len(_MAGIC))
        except FileNotFoundError:
            return
        except OSError as fault:
            raise StoreError(f"{self.path} cannot be read: {fault.strerror}", path=str(self.path)) from fault
        if head and head != _MAGIC:
            raise StoreError(
                f"{self.path} is not a database. Give the name of a store, or of a file that is not there yet", path=str(self.path)
            )

    def _check(self) -> None:
        """Whose file it is, and of which format; make the tables in an empty one."""
        connection = self._connection
        if self.read_only:
            self._recognise()
            return
        connection.execute("BEGIN IMMEDIATE")  # of two processes that find an empty file, one makes the tables
        try:
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in filter(str.strip, self._schema.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {self._version}")
            self._recognise()
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    def _recognise(self) -> None:
        if not self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise StoreError(f"{self.path} is empty; fill it with `fxmerge measure`", path=str(self.path))
        application, version = (
            self._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        if application != _APPLICATION:
            raise StoreError(f"{self.path} is a database of another program; give another file name", path=str(self.path))
        if version != self._version:
            raise StoreError(
                f"{self.path} is a store of format {version}, this fxmerge reads {self._version}; give another file name",
                path=str(self.path),
            )

    @contextmanager
    def _blame(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OverflowError) as fault:
            advice = next((text for part, text in _ADVICE.items() if part in str(fault)), "")
            raise StoreError(f"{self.path}: {fault!s:.120}{advice}", path=str(self.path)) from fault
