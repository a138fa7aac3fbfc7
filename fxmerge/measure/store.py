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

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType

from fxmerge.core.segment import Candidate
from fxmerge.core.table import Importance, Measurement, Target
from fxmerge.errors import StoreError
from fxmerge.measure import rows
from fxmerge.measure.database import Database
from fxmerge.measure.study import FORMAT, Study, Subject, Trial, digest, text_of

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


class Store:
    """A file of measurements.

    Args:
        path: made if it is not there, in a folder that is.
        read_only: only look; the file must be there.
        patience_s: how long to wait for another process that is writing.

    Raises (when made and by every method):
        StoreError: the file cannot be opened, read or written, or is no store; nothing in it is changed then.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Store(f"{folder}/tables.db") as store:
    ...     store.importances(Subject("network", "data", "scorer"))
    {}
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, patience_s: float = 60.0) -> None:
        self._file = Database(path, _SCHEMA, FORMAT, read_only=read_only, patience_s=patience_s)
        self.path = self._file.path

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    # -- latency ------------------------------------------------------------------------------------------------------

    def latencies(self, place: str, target: Target, works: Sequence[str]) -> dict[str, Measurement]:
        """The finished measurements among these works, by work.

        Args:
            place: from :func:`place_of`.
            target: what the measurements are given as.
            works: texts that say what is done at which sizes.
        """
        found = {}
        for work in works:
            query = "SELECT median_ns, spread_ns, repeats, versions FROM latency WHERE place = ? AND work = ?"
            for median_ns, spread_ns, repeats, versions in self._file.read(query, place, digest(work)):
                with self._file.row("latency", work, place=place, work=digest(work)):
                    found[work] = rows.measurement(median_ns, spread_ns, repeats, target, self._file.mapping(versions))
        return found

    def add_latency(self, place: str, work: str, measurement: Measurement) -> None:
        """Write a finished measurement; its samples are not needed any more."""
        key = (place, digest(work))
        with self._file.writing() as connection:
            connection.execute(
                "INSERT INTO latency VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    *key,
                    work,
                    measurement.median_ns,
                    measurement.spread_ns,
                    measurement.repeats,
                    text_of(dict(measurement.versions)),
                    time.time(),
                ),
            )
            connection.execute("DELETE FROM sample WHERE place = ? AND work = ?", key)

    def samples(self, place: str, work: str) -> list[int]:
        """Nanoseconds measured so far of a work that is not finished, in the order they were taken."""
        found = self._file.read("SELECT ns FROM sample WHERE place = ? AND work = ? ORDER BY number", place, digest(work))
        with self._file.row("sample", work, place=place, work=digest(work)):
            return [rows.whole("ns", ns, 0) for (ns,) in found]

    def add_samples(self, place: str, samples: Mapping[str, tuple[int, int]]) -> None:
        """Write (number, nanoseconds) for each work, all or none."""
        taken = [(place, digest(work), number, ns) for work, (number, ns) in samples.items()]
        with self._file.writing() as connection:
            connection.executemany("INSERT INTO sample VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", taken)

    # -- importance ---------------------------------------------------------------------------------------------------

    def importances(self, subject: Subject) -> dict[str, Importance]:
        """All that was scored of a subject, by the key of the candidate (:func:`key_of`)."""
        found = self._file.read("SELECT candidate, loss, samples, scorer FROM importance WHERE subject = ?", subject.digest)
        scores = {}
        for candidate, *values in found:
            with self._file.row("importance", candidate, subject=subject.digest):
                scores[candidate] = rows.importance(*values)
        return scores

    def add_importances(self, subject: Subject, scores: Mapping[str, Importance]) -> None:
        """Write scores by the key of the candidate, all or none."""
        now, whose = time.time(), subject.digest
        scored = [(whose, key, float(score.loss), score.samples, score.scorer, now) for key, score in scores.items()]
        with self._file.writing() as connection:
            connection.executemany("INSERT INTO importance VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", scored)

    # -- studies ------------------------------------------------------------------------------------------------------

    def add_study(self, study: Study) -> str:
        """Write a study; returns its digest. The same study twice is one, and the latest."""
        content = study.to_json()
        key = digest([study.name, content])
        with self._file.writing() as connection:
            connection.execute(
                "INSERT INTO study (digest, name, content, at) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (digest) DO UPDATE SET at = excluded.at",
                (key, study.name, text_of(content), time.time()),
            )
        return key

    def studies(self) -> list[tuple[int, str]]:
        """Number and name of every study, the oldest first."""
        return [(number, name) for number, name in self._file.read("SELECT id, name FROM study ORDER BY id")]

    def study(self, number: int | None = None) -> Study:
        """One study; the latest, without a number.

        Raises:
            StoreError: there is none, or its text is damaged.
        """
        found = self._file.read(f"SELECT name, content FROM study WHERE id = {_WHICH}", number)
        if not found:
            held = ", ".join(f"{n} ({name})" for n, name in self.studies())
            there = f"it holds {held}" if held else "`fxmerge measure` and compress(store=) leave one, single measurements do not"
            wanted = "" if number is None else f" {number}"
            raise StoreError(f"{self.path} holds no study{wanted}; {there}", path=str(self.path))
        try:
            return Study.from_json(found[0][0], self._file.mapping(found[0][1]))
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise StoreError(
                f"{self.path} is damaged: a study in it cannot be read ({fault}). Measure again.", path=str(self.path)
            ) from fault

    def add_trial(self, study: str, trial: Trial) -> None:
        """Write what a plan of a study (its digest) was predicted and measured to take."""
        with self._file.writing() as connection:
            connection.execute("INSERT INTO trial VALUES (?, ?, ?)", (study, text_of(trial.to_json()), time.time()))

    def trials(self, number: int | None = None) -> list[Trial]:
        """What was measured end to end of a study's plans; of the latest study's, without a number."""
        query = f"SELECT content FROM trial WHERE study = (SELECT digest FROM study WHERE id = {_WHICH}) ORDER BY at"
        found = self._file.read(query, number)
        try:
            return [Trial.from_json(self._file.mapping(text)) for (text,) in found]
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise StoreError(
                f"{self.path} is damaged: a trial in it cannot be read ({fault}). Measure again.", path=str(self.path)
            ) from fault


#: A number, or where that is None the study that was written last.
_WHICH = "coalesce(?, (SELECT id FROM study ORDER BY at DESC, id DESC LIMIT 1))"


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
