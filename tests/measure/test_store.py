"""A store keeps what is written, whatever happens to the process, the disk and the file."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxmerge
from fxmerge.core.region import Chain, Unit
from fxmerge.core.table import Importance, Measurement, Target
from fxmerge.errors import StoreError
from fxmerge.measure.store import Store, key_of, place_of
from fxmerge.measure.study import Study, Subject, Trial
from fxmerge.measure.timer import InterleavedTimer, Timed
from tests.fakes import PriceTimer
from tests.small import images, network

SUBJECT = Subject("network", "data", "scorer")
TARGET = Target()
TRIAL = Trial(fxmerge.Plan("print", (), 3, 0.5), Measurement(5, 1, 3, TARGET), Measurement(4, 1, 3, TARGET))


@pytest.fixture(scope="module")
def found() -> tuple[fxmerge.Findings, tuple[fxmerge.Proposal, ...]]:
    findings = fxmerge.find_segments(fxmerge.trace(network(blocks=1), images(4)))
    return findings, fxmerge.propose(findings)


@dataclass(frozen=True)
class Slow:
    """A scorer that takes its time, gives numbers that depend on the candidate alone, and writes down what it was asked."""

    diary: str
    seconds: float = 0.0

    @property
    def settings(self) -> str:
        return "slow"

    def tasks(
        self, findings: fxmerge.Findings, proposals: Sequence[fxmerge.Proposal], at_least: int
    ) -> Sequence[Sequence[fxmerge.Proposal]]:
        return [[fxmerge.Proposal(p.segment, (c,))] for p in proposals for c in p.candidates]

    def prepare(self, findings: fxmerge.Findings, batches: Sequence[object]):  # type: ignore[no-untyped-def]
        return self._score

    def _score(self, proposals: Sequence[fxmerge.Proposal]) -> dict[str, Importance]:
        [proposal] = proposals
        [candidate] = proposal.candidates
        with open(self.diary, "a") as diary:
            diary.write(f"{os.getpid()} {candidate.id}\n")
        time.sleep(self.seconds)
        return {candidate.id: Importance(len(candidate.id) / 7, 3, "slow")}


def _fill(path: str, diary: str, found, seconds: float) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    with Store(path) as store:
        fxmerge.measure_latency(findings, proposals, images(4), timer=PriceTimer(), store=store)
        fxmerge.measure_importance(findings, proposals, images(8), scorer=Slow(diary, seconds), store=store)


def test_fifty_kills_lose_nothing_and_measure_nothing_twice(tmp_path: Path, found) -> None:  # type: ignore[no-untyped-def]
    _, proposals = found
    path, diary = tmp_path / "tables.db", tmp_path / "diary"
    Store(path).close()
    fork, generator = multiprocessing.get_context("fork"), random.Random(0)
    asked: list[str] = []
    patience_s = 0.25
    for _ in range(50):
        before = _written(path)
        diary.write_text("")
        child = fork.Process(target=_fill, args=(str(path), str(diary), found, 0.005))
        child.start()
        child.join(generator.uniform(0.0, patience_s))
        child.kill()
        child.join()
        tried = [line.partition(" ")[2] for line in diary.read_text().splitlines()]
        keys = {c.id: key_of(c) for p in proposals for c in p.candidates}
        assert not before & {keys[name] for name in tried}, "what was finished was measured again"
        assert before <= _written(path), "what was finished was lost"
        asked += tried
        patience_s = 0.25 if tried else min(2 * patience_s, 4.0)  # a busy machine gets to nothing in a quarter of a second
    assert asked
    _fill(str(path), str(diary), found, 0.0)
    undisturbed = tmp_path / "undisturbed.db"
    _fill(str(undisturbed), str(diary), found, 0.0)
    assert _tables(path) == _tables(undisturbed)


def _written(path: Path) -> set[str]:
    with sqlite3.connect(path) as connection:
        return {key for (key,) in connection.execute("SELECT candidate FROM importance")}


def _tables(path: Path) -> list[object]:
    with sqlite3.connect(path) as connection:
        latency = connection.execute("SELECT place, work, median_ns, spread_ns, repeats FROM latency ORDER BY 1, 2").fetchall()
        importance = connection.execute("SELECT subject, candidate, loss, samples FROM importance ORDER BY 1, 2").fetchall()
    return [latency, importance]


def test_two_processes_fill_one_store(tmp_path: Path, found) -> None:  # type: ignore[no-untyped-def]
    path, diary = str(tmp_path / "tables.db"), str(tmp_path / "diary")
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_fill, args=(path, diary, found, 0.002)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    _fill(str(tmp_path / "alone.db"), diary, found, 0.0)
    assert _tables(tmp_path / "tables.db") == _tables(tmp_path / "alone.db")


def test_samples_of_a_run_that_died_are_gone_on_from(tmp_path: Path, found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    works = len(fxmerge.measure_latency(findings, proposals, images(4), timer=PriceTimer()).measurements)
    ticks = iter(range(10**9))
    taken, fatal = 0, 2 * 2 * works + 2 * 2 * works + works  # two warm-ups each, two rounds, in the middle of the third

    def clock() -> int:
        nonlocal taken
        taken += 1
        if taken == fatal:
            raise KeyboardInterrupt
        return next(ticks) * 1_000_000

    timer = InterleavedTimer(rounds=5, max_runs_per_sample=1, clock=clock)
    with Store(tmp_path / "tables.db") as store, pytest.raises(KeyboardInterrupt):
        fxmerge.measure_latency(findings, proposals, images(4), timer=timer, store=store)
    with sqlite3.connect(tmp_path / "tables.db") as connection:
        samples = connection.execute("SELECT count(*), count(DISTINCT work) FROM sample").fetchone()
    assert 0 < samples[1] <= samples[0] <= 2 * works
    before = taken
    with Store(tmp_path / "tables.db") as store:
        table = fxmerge.measure_latency(findings, proposals, images(4), timer=timer, store=store)
    # Warm-ups again, then only the samples that were missing; two readings of the clock for each. Last the network with a reading
    # behind each node, seven times.
    inside = 7 * (1 + sum(node.op.startswith("call_") for node in fxmerge.baseline(findings.graph).graph.nodes))
    assert taken - before <= 2 * (2 * works + 5 * works - samples[0]) + 2 * 8 + inside
    assert all(table.unit_ns(end) > 0 for end in table.inside)
    assert all(m.repeats in (0, 5) for m in table.measurements.values())


def test_latencies_of_equal_geometries_are_shared_between_networks(tmp_path: Path) -> None:
    timer = PriceTimer()
    with Store(tmp_path / "tables.db") as store:
        for blocks in (1, 2):
            findings = fxmerge.find_segments(fxmerge.trace(network(blocks=blocks), images(4)))
            before = len(timer.asked)
            table = fxmerge.measure_latency(findings, fxmerge.propose(findings), images(4), timer=timer, store=store)
            asked = len(timer.asked) - before
            assert asked <= (len(table.measurements) + 1 if blocks == 1 else len(table.measurements) // 2)


def test_another_timer_measures_anew(tmp_path: Path, found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    timers = [PriceTimer(), PriceTimer(), PriceTimer()]
    timers[2].settings = "other prices"
    with Store(tmp_path / "tables.db") as store:
        for timer in timers:
            fxmerge.measure_latency(findings, proposals, images(4), timer=timer, store=store)
        assert [bool(timer.asked) for timer in timers] == [True, False, True]
        del timers[0].settings
        with pytest.raises(fxmerge.InputError, match="PriceTimer has no text `settings`"):
            fxmerge.measure_latency(findings, proposals, images(4), timer=timers[0], store=store)
    quick, long = InterleavedTimer(rounds=3), InterleavedTimer(rounds=9)
    assert quick.settings != long.settings
    assert InterleavedTimer(rounds=3, seed=5).settings == quick.settings


def test_the_latest_study_is_the_one_written_last(tmp_path: Path) -> None:
    table = fxmerge.LatencyTable({}, {}, {}, Measurement(5, 1, 3, TARGET))
    first, second = (Study(name, "print", Unit("", ()), (), table, fxmerge.ImportanceTable({})) for name in "ab")
    with Store(tmp_path / "tables.db") as store:
        for study in (first, second, first):
            store.add_study(study)
        assert store.study() == first
        assert store.study(2) == second


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(StoreError, match="is empty; fill it with `fxmerge measure`"):
        Store(tmp_path / "empty", read_only=True)


def test_every_row_is_under_what_determines_it(tmp_path: Path) -> None:
    measurement = Measurement(5, 1, 3, TARGET, {"torch": "2", "python": "3"})
    with Store(tmp_path / "tables.db") as store:
        store.add_latency(place_of(TARGET, {"torch": "2"}), "conv", measurement)
        assert store.latencies(place_of(TARGET, {"torch": "2", "python": "4"}), TARGET, ["conv"])["conv"].median_ns == 5
        for other in (
            place_of(Target(dtype="bfloat16"), {"torch": "2"}),
            place_of(TARGET, {"torch": "3"}),
            place_of(Target(threads=1), {"torch": "2"}),
            place_of(TARGET, {"torch": "2"}, "another timer"),
        ):
            assert not store.latencies(other, TARGET, ["conv"])
        store.add_importances(SUBJECT, {"a": Importance(0.5, 8, "s")})
        assert store.importances(SUBJECT) == {"a": Importance(0.5, 8, "s")}
        for other_subject in (Subject("x", "data", "scorer"), Subject("network", "x", "scorer"), Subject("network", "data", "x")):
            assert store.importances(other_subject) == {}


def test_other_weights_other_data_and_other_options_are_scored_anew(tmp_path: Path, found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    some = proposals[:2]
    diary = tmp_path / "diary"
    diary.write_text("")
    other = fxmerge.find_segments(fxmerge.trace(network(blocks=1, seed=1), images(4)))
    with Store(tmp_path / "tables.db") as store:
        counts = []
        for which, data in ((findings, images(8)), (findings, images(8)), (other, images(8)), (findings, images(8, seed=5))):
            fxmerge.measure_importance(which, some, data, scorer=Slow(str(diary)), store=store)
            counts.append(len(diary.read_text().splitlines()))
    scored = counts[0]
    assert scored > 0
    assert counts == [scored, scored, 2 * scored, 3 * scored]


def test_a_store_of_single_measurements_says_what_leaves_a_study(tmp_path: Path) -> None:
    with (
        Store(tmp_path / "tables.db") as store,
        pytest.raises(StoreError, match=r"holds no study; `fxmerge measure` and compress\(store=\) leave one"),
    ):
        store.study()


def test_a_study_gives_the_same_front_without_the_network(tmp_path: Path, found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    latency = fxmerge.measure_latency(findings, proposals, images(4), timer=PriceTimer())
    importance = fxmerge.measure_importance(findings, proposals, images(16))
    candidates = tuple(c for p in proposals for c in p.candidates)
    study = Study("small", findings.fingerprint, findings.region, candidates, latency, importance)
    with Store(tmp_path / "tables.db") as store:
        key = store.add_study(study)
        assert store.add_study(study) == key
        assert store.studies() == [(1, "small")]
        store.add_trial(key, TRIAL)
    with Store(tmp_path / "tables.db", read_only=True) as store:
        read = store.study()
        assert store.trials() == [TRIAL]
        with pytest.raises(StoreError, match="holds no study 7; it holds 1 \\(small\\)"):
            store.study(7)
    assert read == study
    front = fxmerge.solve(read.region, read.candidates, read.latency, read.importance, read.fingerprint)
    expected = fxmerge.solve(findings.region, candidates, latency, importance, findings.fingerprint)
    assert (front.latencies_ns, front.losses) == (expected.latencies_ns, expected.losses)


def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path: Path) -> None:
    with Store(tmp_path / "tables.db") as store:
        store.add_importances(SUBJECT, {"first": Importance(0.5, 8, "s")})
        pages = store._file._connection.execute("PRAGMA page_count").fetchone()[0]
        store._file._connection.execute(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(StoreError, match="disk is full. What was written before is safe"):
            store.add_importances(SUBJECT, {f"{number:060}": Importance(0.5, 8, "s") for number in range(1000)})
        assert set(store.importances(SUBJECT)) == {"first"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    Store(folder / "tables.db").close()
    folder.chmod(0o555)
    (folder / "tables.db").chmod(0o444)
    try:
        with pytest.raises(StoreError, match="cannot be (read or )?writ"):
            Store(folder / "new.db")
        with pytest.raises(StoreError, match="cannot be written to"):
            Store(folder / "tables.db")
        with Store(folder / "tables.db", read_only=True) as store:
            assert store.studies() == []
    finally:
        folder.chmod(0o755)


def test_a_read_only_file_system_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As root no mode bit forbids writing; SQLite itself says the same of a connection opened to read.
    Store(tmp_path / "tables.db").close()
    real = sqlite3.connect
    uri = f"{(tmp_path / 'tables.db').as_uri()}?mode=ro"
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: real(uri, uri=True, **options))
    with pytest.raises(StoreError, match="readonly database. The file or its folder cannot be written to"):
        Store(tmp_path / "tables.db").add_importances(SUBJECT, {"a": Importance(0.5, 8, "s")})


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    for name, content in (("text", b"hello, this is no database at all" * 100), ("short", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreError, match="not a database"):
            Store(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE precious (x)")
    connection.close()
    before = (tmp_path / "other").read_bytes()
    with pytest.raises(StoreError, match="of another program"):
        Store(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == before
    with pytest.raises(StoreError, match="no folder"):
        Store(tmp_path / "nowhere" / "tables.db")
    with pytest.raises(StoreError, match="is a folder"):
        Store(tmp_path)
    with pytest.raises(StoreError, match="no such file"):
        Store(tmp_path / "missing", read_only=True)
    with Store(tmp_path / "later") as store:
        store._file._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="of format 99"):
        Store(tmp_path / "later")


def test_a_read_only_store_is_not_written_to(tmp_path: Path) -> None:
    Store(tmp_path / "tables.db").close()
    with Store(tmp_path / "tables.db", read_only=True) as store, pytest.raises(StoreError, match="read only"):
        store.add_importances(SUBJECT, {"a": Importance(0.5, 8, "s")})


@given(
    damage=st.sampled_from(
        ["", "[", "[]", "{}", '{"format": 1}', '{"format": 2, "candidates": []}', "null", '{"format":1,"region":3}']
    )
)
def test_a_damaged_study_is_told(tmp_path_factory: pytest.TempPathFactory, damage: str) -> None:
    path = tmp_path_factory.mktemp("store") / "tables.db"
    with Store(path) as store:
        store._file._connection.execute("INSERT INTO study (digest, name, content, at) VALUES ('x', 'name', ?, 0)", (damage,))
        with pytest.raises(StoreError, match="is damaged"):
            store.study()


def test_a_region_survives_json_and_nonsense_is_refused() -> None:
    inner = Chain(("x", "a"), (Unit("a", ("a",)),))
    region = Unit("", (), (Chain(("x", "b", "c"), (Unit("b", ("b", "add"), (inner,)), Unit("c", ("c",)))),))
    assert Unit.from_json(json.loads(json.dumps(region.to_json()))) == region
    for nonsense in ({}, {"end": 3, "nodes": [], "children": []}, {"end": "", "nodes": "ab", "children": []}):
        with pytest.raises(fxmerge.PlanError, match="not a region"):
            Unit.from_json(nonsense)


def test_only_one_timer_runs_at_a_time(tmp_path: Path) -> None:
    """Each of two processes writes its letter whenever its module runs; the letters do not mix."""
    diary = tmp_path / "diary"
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_time_a_sleeper, args=(str(diary), letter)) for letter in "ab"]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    text = diary.read_text()
    assert len(text) >= 20
    assert text in ("".join(sorted(text)), "".join(sorted(text, reverse=True)))


def _time_a_sleeper(diary: str, letter: str) -> None:
    class Sleeper(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with open(diary, "a") as file:
                file.write(letter)
            time.sleep(0.01)
            return x

    InterleavedTimer(rounds=9, max_runs_per_sample=1)([Timed(Sleeper(), ((1,),))], target=TARGET)


def test_a_timer_without_a_log_is_given_a_few_at_a_time(tmp_path: Path, found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found

    class Dies(PriceTimer):
        def __call__(self, modules: Sequence[Timed], *, target: Target, progress: object = None) -> tuple[Measurement, ...]:
            if self.asked:
                raise KeyboardInterrupt
            return super().__call__(modules, target=target)

    with Store(tmp_path / "tables.db") as store:
        with pytest.raises(KeyboardInterrupt):
            fxmerge.measure_latency(findings, proposals, images(4), timer=Dies(), store=store)
        with sqlite3.connect(tmp_path / "tables.db") as connection:
            assert connection.execute("SELECT count(*) FROM latency").fetchone()[0] == 16


def _put(store: Store, statement: str, *values: object) -> None:
    store._file._connection.execute(statement, values)


@pytest.mark.parametrize("found", [-5, "much", b"\x00", 2.5])
def test_a_latency_that_is_no_number_of_nanoseconds_is_told_with_its_row_and_nothing_is_lost(tmp_path: Path, found: object) -> None:
    place = place_of(TARGET, {})
    with Store(tmp_path / "tables.db") as store:
        for work in ("conv", "pool"):
            store.add_latency(place, work, Measurement(5, 1, 3, TARGET))
        _put(store, "UPDATE latency SET median_ns = ? WHERE text = 'conv'", found)
        message = (
            r"tables\.db is damaged: table latency, the row of 'conv' \(place .*, work .*\): median_ns is .*, expected a whole"
        )
        with pytest.raises(StoreError, match=message):
            store.latencies(place, TARGET, ["pool", "conv"])
        assert store.latencies(place, TARGET, ["pool"])["pool"].median_ns == 5
        assert store._file._connection.execute("SELECT count(*) FROM latency").fetchone() == (2,)


@pytest.mark.parametrize(("column", "found"), [("spread_ns", -1), ("spread_ns", "x"), ("repeats", -1), ("repeats", 0.5)])
def test_other_numbers_of_a_latency_are_checked_too(tmp_path: Path, column: str, found: object) -> None:
    place = place_of(TARGET, {})
    with Store(tmp_path / "tables.db") as store:
        store.add_latency(place, "conv", Measurement(5, 1, 3, TARGET))
        _put(store, f"UPDATE latency SET {column} = ?", found)
        with pytest.raises(StoreError, match=f"table latency, .*: {column} is {found!r}, expected a whole number from 0 on"):
            store.latencies(place, TARGET, ["conv"])


@pytest.mark.parametrize("found", [-5, "much", b"\x00", 2.5])
def test_a_sample_that_is_no_number_of_nanoseconds_is_told(tmp_path: Path, found: object) -> None:
    with Store(tmp_path / "tables.db") as store:
        store.add_samples("here", {"conv": (0, 7)})
        _put(store, "UPDATE sample SET ns = ?", found)
        with pytest.raises(
            StoreError, match=r"table sample, the row of 'conv' \(place here, .*\): ns is .*, expected a whole number"
        ):
            store.samples("here", "conv")


@pytest.mark.parametrize(
    ("column", "found"), [("loss", "much"), ("loss", float("inf")), ("loss", b""), ("samples", "x"), ("samples", -1), ("scorer", 3)]
)
def test_an_importance_that_is_none_is_told_with_its_row(tmp_path: Path, column: str, found: object) -> None:
    with Store(tmp_path / "tables.db") as store:
        store.add_importances(SUBJECT, {"a": Importance(0.5, 8, "s")})
        _put(store, f"UPDATE importance SET {column} = ?", found if column != "scorer" else b"3")
        with pytest.raises(StoreError, match=rf"table importance, the row of 'a' \(subject .*\): {column} is "):
            store.importances(SUBJECT)


@pytest.mark.parametrize("part", ["original", "merged"])
def test_a_trial_or_a_study_of_no_time_at_all_is_told(tmp_path: Path, part: str) -> None:
    table = fxmerge.LatencyTable({}, {}, {}, Measurement(5, 1, 3, TARGET))
    nothing = Measurement(0, 0, 3, TARGET)
    with Store(tmp_path / "tables.db") as store:
        key = store.add_study(Study("a", "print", Unit("", ()), (), table, fxmerge.ImportanceTable({})))
        store.add_trial(key, replace(TRIAL, **{part: nothing}))  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="a trial in it cannot be read .the latency of a whole network is 0 ns"):
            store.trials()
        store.add_study(Study("b", "print", Unit("", ()), (), replace(table, network=nothing), fxmerge.ImportanceTable({})))
        with pytest.raises(StoreError, match="a study in it cannot be read .the latency of a whole network is 0 ns"):
            store.study()


def test_a_whole_network_that_takes_no_time_is_told(tmp_path: Path, found) -> None:  # type: ignore[no-untyped-def]
    findings, proposals = found
    with Store(tmp_path / "tables.db") as store:
        fxmerge.measure_latency(findings, proposals, images(4), timer=PriceTimer(), store=store)
        store._file._connection.execute("UPDATE latency SET median_ns = 0 WHERE text LIKE 'whole: %'")
        with pytest.raises(
            StoreError, match=r"tables\.db is damaged: table latency, the row of 'whole: .*: median_ns is 0, expected"
        ):
            fxmerge.measure_latency(findings, proposals, images(4), timer=PriceTimer(), store=store)

    class Stopped(PriceTimer):
        def _price(self, timed: Timed) -> int:
            return 0

    with pytest.raises(fxmerge.InputError, match="the timer Stopped says that the whole network takes 0 ns; it must take some"):
        fxmerge.measure_latency(findings, proposals, images(4), timer=Stopped())
