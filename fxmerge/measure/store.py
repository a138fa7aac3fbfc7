"""Measurements on disk the moment they exist: a run that dies goes on where it stopped.

One SQLite file in WAL mode. A row is written once, in a transaction of its own, and never changed: after a kill at any moment
every row that was written is there, and none is half there. Two processes may fill one file; of two measurements of one thing the
first to arrive stays, and both read that one. What a row is keyed by is what determines it:

    latency      the work (operations, settings, sizes), the target, the processor or GPU, torch's version, the threads, the timer
    importance   the network with its weights, the calibration data, the scorer with its settings, the candidate

so that latencies of equal geometries are shared by all networks, and nothing is taken for something else.
A store is data: JSON texts and numbers, read with the care of any file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.region import Unit
from fxmerge.core.segment import Candidate
from fxmerge.core.table import Importance, ImportanceTable, LatencyTable, Measurement, Target
from fxmerge.errors import PlanError, StoreError
from fxmerge.measure import rows
from fxmerge.solve.frontier import solve_tables
from fxmerge.solve.objective import Objective
from fxmerge.solve.space import SpaceName

FORMAT = 1
_APPLICATION = 0x66786D67  # "fxmg", in the header of the file
_SCHEMA = """
CREATE TABLE latency (
    place TEXT NOT NULL, work TEXT NOT NULL, text TEXT NOT NULL, median_ns INTEGER NOT NULL, spread_ns INTEGER NOT NULL,
    repeats INTEGER NOT NULL, versions TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (place, work)) WITHOUT ROWID;
CREATE TABLE sample (
    place TEXT NOT NULL, work TEXT NOT NULL, number INTEGER NOT NULL, ns INTEGER NOT NULL,
    PRIMARY KEY (place, work, number)) WITHOUT ROWID;
CREATE TABLE importance (
    subject TEXT NOT NULL, candidate TEXT NOT NULL, loss REAL NOT NULL, samples INTEGER NOT NULL, scorer TEXT NOT NULL,
    at REAL NOT NULL, PRIMARY KEY (subject, candidate)) WITHOUT ROWID;
CREATE TABLE study (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, name TEXT NOT NULL, content TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE trial (study TEXT NOT NULL, content TEXT NOT NULL, at REAL NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Subject:
    """What an importance belongs to beside its candidate.

    Args:
        network: digest of the graph and its weights.
        data: digest of the calibration data.
        scorer: the scorer with its settings, as text.
    """

    network: str
    data: str
    scorer: str

    @property
    def digest(self) -> str:
        return digest(asdict(self))


@dataclass(frozen=True, slots=True)
class Study:
    """All that the solver needs of one network on one target, so that plans can be made without the network at hand.

    Args:
        name: what the network was called; for people.
        fingerprint: of its graph.
        region: its tree of chains.
        candidates: what was offered, in order.
        latency, importance: the tables.
    """

    name: str
    fingerprint: str
    region: Unit
    candidates: tuple[Candidate, ...]
    latency: LatencyTable
    importance: ImportanceTable

    def front(self, *, space: SpaceName = "joint", objective: Objective = "additive-loss") -> ParetoFront:
        """Every plan that no other beats; see :func:`fxmerge.solve`."""
        tables = (self.region, self.candidates, self.latency, self.importance, self.fingerprint)
        return solve_tables(*tables, space=space, objective=objective)


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan of a study that was built and timed, end to end.

    Args:
        plan: with its predicted latency, loss and objective.
        original: the folded original, timed in turn with
        merged: the merged network.
    """

    plan: Plan
    original: Measurement
    merged: Measurement


class Store:
    """A file of measurements.

    Args:
        path: made if it is not there, in a folder that is.
        read_only: only look; the file must be there.
        patience_s: how long to wait for another process that is writing.

    Raises (when made and by every method):
        StoreError: the file cannot be opened, read or written, or is no store; nothing in it is changed then.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "tables.db") as store:
    ...     store.importances(Subject("network", "data", "scorer"))
    {}
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, patience_s: float = 60.0) -> None:
        self.path = Path(path)
        self.read_only = read_only
        with self._blame():
            self._connection = self._open(patience_s)
        try:
            with self._blame():
                self._check()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    # -- latency ------------------------------------------------------------------------------------------------------

    def latencies(self, place: str, target: Target, works: Sequence[str]) -> dict[str, Measurement]:
        """The finished measurements among these works, by work.

        Args:
            place: from :func:`place_of`.
            target: what the measurements are given as.
            works: texts that say what is done at which sizes.
        """
        found = {}
        with self._blame():
            for work in works:
                row = self._connection.execute(
                    "SELECT median_ns, spread_ns, repeats, versions FROM latency WHERE place = ? AND work = ?",
                    (place, digest(work)),
                ).fetchone()
                if row is not None:
                    with self._row("latency", work, place=place, work=digest(work)):
                        found[work] = rows.measurement(row[0], row[1], row[2], target, self._mapping(row[3]))
        return found

    def add_latency(self, place: str, work: str, measurement: Measurement) -> None:
        """Write a finished measurement; its samples are not needed any more."""
        key = (place, digest(work))
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO latency VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    *key,
                    work,
                    measurement.median_ns,
                    measurement.spread_ns,
                    measurement.repeats,
                    _json(dict(measurement.versions)),
                    time.time(),
                ),
            )
            connection.execute("DELETE FROM sample WHERE place = ? AND work = ?", key)

    def samples(self, place: str, work: str) -> list[int]:
        """Nanoseconds measured so far of a work that is not finished, in the order they were taken."""
        with self._blame():
            found = self._connection.execute(
                "SELECT ns FROM sample WHERE place = ? AND work = ? ORDER BY number", (place, digest(work))
            ).fetchall()
        with self._row("sample", work, place=place, work=digest(work)):
            return [rows.whole("ns", ns, 0) for (ns,) in found]

    def add_samples(self, place: str, samples: Mapping[str, tuple[int, int]]) -> None:
        """Write (number, nanoseconds) for each work, all or none."""
        taken = [(place, digest(work), number, ns) for work, (number, ns) in samples.items()]
        with self._writing() as connection:
            connection.executemany("INSERT INTO sample VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", taken)

    # -- importance ---------------------------------------------------------------------------------------------------

    def importances(self, subject: Subject) -> dict[str, Importance]:
        """All that was scored of a subject, by the key of the candidate (:func:`key_of`)."""
        with self._blame():
            found = self._connection.execute(
                "SELECT candidate, loss, samples, scorer FROM importance WHERE subject = ?", (subject.digest,)
            ).fetchall()
        scores = {}
        for candidate, *values in found:
            with self._row("importance", candidate, subject=subject.digest):
                scores[candidate] = rows.importance(*values)
        return scores

    def add_importances(self, subject: Subject, scores: Mapping[str, Importance]) -> None:
        """Write scores by the key of the candidate, all or none."""
        now, whose = time.time(), subject.digest
        scored = [(whose, key, float(score.loss), score.samples, score.scorer, now) for key, score in scores.items()]
        with self._writing() as connection:
            connection.executemany("INSERT INTO importance VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", scored)

    # -- studies ------------------------------------------------------------------------------------------------------

    def add_study(self, study: Study) -> str:
        """Write a study; returns its digest. The same study twice is one, and the latest."""
        content = {
            "format": FORMAT,
            "fingerprint": study.fingerprint,
            "region": study.region.to_json(),
            "candidates": [candidate.to_json() for candidate in study.candidates],
            "latency": study.latency.to_json(),
            "importance": study.importance.to_json(),
        }
        key = digest([study.name, content])
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO study (digest, name, content, at) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (digest) DO UPDATE SET at = excluded.at",
                (key, study.name, _json(content), time.time()),
            )
        return key

    def studies(self) -> list[tuple[int, str]]:
        """Number and name of every study, the oldest first."""
        with self._blame():
            return self._connection.execute("SELECT id, name FROM study ORDER BY id").fetchall()

    def study(self, number: int | None = None) -> Study:
        """One study; the latest, without a number.

        Raises:
            StoreError: there is none, or its text is damaged.
        """
        with self._blame():
            row = self._connection.execute(f"SELECT name, content FROM study WHERE id = {_WHICH}", (number,)).fetchone()
        if row is None:
            held = ", ".join(f"{n} ({name})" for n, name in self.studies()) or "none; fill it with `fxmerge measure`"
            raise StoreError(
                f"{self.path} holds no study{'' if number is None else f' {number}'}; it holds {held}", path=str(self.path)
            )
        try:
            return _study(row[0], self._mapping(row[1]))
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise StoreError(
                f"{self.path} is damaged: a study in it cannot be read ({fault}). Measure again.", path=str(self.path)
            ) from fault

    def add_trial(self, study: str, trial: Trial) -> None:
        """Write what a plan of a study (its digest) was predicted and measured to take."""
        content = {"plan": trial.plan.to_json(), "original": trial.original.to_json(), "merged": trial.merged.to_json()}
        with self._writing() as connection:
            connection.execute("INSERT INTO trial VALUES (?, ?, ?)", (study, _json(content), time.time()))

    def trials(self, number: int | None = None) -> list[Trial]:
        """What was measured end to end of a study's plans; of the latest study's, without a number."""
        with self._blame():
            found = self._connection.execute(
                f"SELECT content FROM trial WHERE study = (SELECT digest FROM study WHERE id = {_WHICH}) ORDER BY at", (number,)
            ).fetchall()
        try:
            return [_trial(self._mapping(text)) for (text,) in found]
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise StoreError(
                f"{self.path} is damaged: a trial in it cannot be read ({fault}). Measure again.", path=str(self.path)
            ) from fault

    # -- the file -----------------------------------------------------------------------------------------------------

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
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
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
        if version != FORMAT:
            raise StoreError(
                f"{self.path} is a store of format {version}, this fxmerge reads {FORMAT}; give another file name",
                path=str(self.path),
            )

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
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
    def _blame(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OverflowError) as fault:
            advice = next((text for part, text in _ADVICE.items() if part in str(fault)), "")
            raise StoreError(f"{self.path}: {fault!s:.120}{advice}", path=str(self.path)) from fault

    @contextmanager
    def _row(self, table: str, name: str, **key: str) -> Iterator[None]:
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

    def _mapping(self, text: str) -> dict[str, Any]:
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


#: A number, or where that is None the study that was written last.
_WHICH = "coalesce(?, (SELECT id FROM study ORDER BY at DESC, id DESC LIMIT 1))"
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


@contextmanager
def opened(store: Store | str | os.PathLike[str] | None) -> Iterator[Store | None]:
    """A store given open, and left so; or one that is opened here and closed at the end; or none."""
    if store is None or isinstance(store, Store):
        yield store
        return
    with Store(store) as made:
        yield made


def place_of(target: Target, versions: Mapping[str, str], timer: str = "") -> str:
    """The digest of where and how something is timed, and by which timer; the version of Python does not count."""
    return digest([asdict(target), {name: value for name, value in versions.items() if name != "python"}, timer])


def key_of(candidate: Candidate) -> str:
    """What a candidate's score is kept under: all that it is, its kind, geometry, what it removes and where."""
    return digest(candidate.to_json())


def digest(value: object) -> str:
    """A short name for a value that ``json`` can write: equal values, equal names, in every process."""
    return hashlib.sha256(_json(value).encode()).hexdigest()[:32]


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _study(name: str, data: Mapping[str, Any]) -> Study:
    if data["format"] != FORMAT:
        raise PlanError(f"its format is {data['format']!r:.40}")
    latency, importance = LatencyTable.from_json(data["latency"]), ImportanceTable.from_json(data["importance"])
    candidates = tuple(Candidate.from_json(candidate) for candidate in data["candidates"])
    _timed(latency.network)
    return Study(name, str(data["fingerprint"]), Unit.from_json(data["region"]), candidates, latency, importance)


def _trial(data: Mapping[str, Any]) -> Trial:
    original, merged = (_timed(Measurement.from_json(data[name])) for name in ("original", "merged"))
    return Trial(Plan.from_json(data["plan"]), original, merged)


def _timed(network: Measurement) -> Measurement:
    """The measurement of a whole network, that others are divided by."""
    if network.median_ns < 1:
        raise ValueError(f"the latency of a whole network is {network.median_ns} ns, expected 1 or more")
    return network
