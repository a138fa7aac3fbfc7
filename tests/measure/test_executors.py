"""Wherever the work runs, the result is the same, and a worker that dies costs the task it was at."""

from __future__ import annotations

import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

import fxmerge
from fxmerge.errors import BudgetError, InputError, NotFiniteError, WorkerError
from fxmerge.graph.portable import message
from fxmerge.measure.executors import Local, Processes, Ray, as_executor
from fxmerge.operators import Join
from fxmerge.passes.annotate import merges
from tests.small import images, network


@dataclass(frozen=True)
class Squares:
    """Squares numbers; writes down each, and dies or complains at some."""

    diary: str
    deadly: int | None = None
    times: int = 0
    seconds: float = 0.0

    def prepare(self, device: str = "") -> Callable[[int], int]:
        return self._square

    def _square(self, number: int) -> int:
        with open(self.diary, "a") as diary:
            diary.write(f"{number}\n")
        if number == self.deadly and Path(self.diary).read_text().split().count(str(number)) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == -1:
            raise NotFiniteError("nothing there", where="layer1")
        if number == -2:
            warnings.warn("two is odd here", stacklevel=1)
        time.sleep(self.seconds)
        return number * number


def _diary(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()]


def test_one_after_the_other_here(tmp_path: Path) -> None:
    assert list(Local().run(Squares(str(tmp_path / "diary")), [3, 4])) == [(0, 9), (1, 16)]


def test_processes_survive_workers_that_die_and_repeat_only_what_was_in_flight(tmp_path: Path) -> None:
    job = Squares(str(tmp_path / "diary"), deadly=5, times=2, seconds=0.05)
    found = dict(Processes(workers=2, threads=1).run(job, list(range(12))))
    assert found == {number: number * number for number in range(12)}
    tried = _diary(tmp_path / "diary")
    assert tried.count(5) == 3
    # At each death one other task was in flight at most.
    assert len(tried) <= 12 + 2 * 2


def test_workers_that_keep_dying_are_given_up_and_errors_and_warnings_come_through(tmp_path: Path) -> None:
    job = Squares(str(tmp_path / "diary"), deadly=0, times=99)
    with pytest.raises(WorkerError, match="died 2 times in a row, with 1 of 1 tasks to do"):
        list(Processes(workers=1, attempts=2).run(job, [0]))
    with pytest.raises(NotFiniteError, match="nothing there") as caught:
        list(Processes(workers=1).run(Squares(str(tmp_path / "diary")), [-1]))
    assert caught.value.where == "layer1"
    with pytest.warns(UserWarning, match="two is odd here"):
        assert list(Processes(workers=1).run(Squares(str(tmp_path / "diary")), [-2])) == [(0, 4)]


@dataclass(frozen=True)
class Unprepared:
    """A job that cannot be prepared: it complains, or its worker dies before it has read all of it."""

    deadly: bool
    load: bytes = bytes(1 << 20)

    def prepare(self, device: str = "") -> Callable[[int], int]:
        raise NotFiniteError("no weights", where="layer2")

    def __setstate__(self, state: Any) -> None:
        if state[0] if isinstance(state, list) else state["deadly"]:
            os.kill(os.getpid(), signal.SIGKILL)
        self.__dict__.update(state)


def test_what_fails_before_the_first_task_is_told_as_it_is() -> None:
    with pytest.raises(NotFiniteError, match="no weights"):
        list(Processes(workers=1).run(Unprepared(deadly=False), [1, 2]))


def test_workers_that_die_at_the_start_do_not_hang_the_one_that_waits() -> None:
    with pytest.raises(WorkerError, match="died 1 times in a row, with 2 of 2 tasks to do.*__main__") as caught:
        list(Processes(workers=1, attempts=1).run(Unprepared(deadly=True), [1, 2]))
    assert (caught.value.done, caught.value.left) == (0, 2)


def test_parametrized_layers_go_to_other_processes_with_their_weights() -> None:
    model = network(blocks=1)
    weight_norm(model[0])
    findings = fxmerge.find_segments(fxmerge.trace(model, images(4)))
    before = findings.graph(images(2))
    there = pickle.loads(message(findings))
    assert torch.equal(findings.graph(images(2)), before), "the original was changed"
    assert torch.allclose(there.graph(images(2)), findings.graph(images(2)), rtol=1e-6, atol=1e-6)
    assert "parametrizations" in str(dict(findings.graph.named_parameters()).keys())


def test_what_cannot_be_sent_is_told() -> None:
    findings = fxmerge.find_segments(fxmerge.trace(network(blocks=1), images(4)))
    scorer = fxmerge.Custom("mine", lambda *_: 0.0)
    with pytest.raises(InputError, match="cannot be sent to another process: .*not local or lambdas"):
        fxmerge.measure_importance(findings, fxmerge.propose(findings), images(8), scorer=scorer, executor=Processes())


def test_scores_from_processes_are_those_from_here() -> None:
    findings = fxmerge.find_segments(fxmerge.trace(network(blocks=1), images(4)))
    proposals = fxmerge.propose(findings)
    here = fxmerge.measure_importance(findings, proposals, images(32))
    there = fxmerge.measure_importance(findings, proposals, images(32), executor=Processes(workers=2, threads=1))
    assert list(here.candidates) == list(there.candidates)
    for name, importance in here.candidates.items():
        assert there.loss(name) == pytest.approx(importance.loss, rel=1e-4, abs=1e-7)


def test_findings_come_through_pickle_as_they_were() -> None:
    findings = fxmerge.find_segments(fxmerge.trace(network(), images(4)))
    there = pickle.loads(message(findings))
    assert (there.segments, there.refusals, there.region) == (findings.segments, findings.refusals, findings.region)
    assert there.fingerprint == findings.fingerprint
    # As text a node is its name: those in a verdict are others there, and of the graph that came through.
    assert {n.name: str(v) for n, v in there.verdicts.items()} == {n.name: str(v) for n, v in findings.verdicts.items()}
    joins = [verdict for verdict in there.verdicts.values() if isinstance(verdict, Join)]
    assert joins
    assert {operand.graph for join in joins for operand in join.operands} == {there.graph.graph}
    assert (there.graph(images(2)) == findings.graph(images(2))).all()
    merge = fxmerge.propose(there)[0].candidates[0]
    annotated = fxmerge.annotate(there.graph, fxmerge.Plan(there.fingerprint, (merge,)))
    assert [(node.name, found) for node, found in merges(annotated)] == [(merge.exit, merge)]


@pytest.mark.parametrize(
    "error", [BudgetError("slow", asked_ns=1, fastest_ns=2), NotFiniteError("nan", where="x"), InputError("no")]
)
def test_errors_come_through_pickle_with_their_facts(error: fxmerge.FxMergeError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there), vars(there)) == (type(error), str(error), vars(error))


def test_executors_are_found_by_name_and_refuse_nonsense() -> None:
    assert as_executor("processes") == Processes()
    given = Local()
    assert as_executor(given) is given
    with pytest.raises(InputError, match="unknown executor 'cloud'; there are local, processes, ray"):
        as_executor("cloud")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1"):
        Processes(workers=0)
    with pytest.raises(InputError, match="negative"):
        Ray(gpus=-1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine, of one task each; the driver is on the first."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'fxmerge[ray]'")
    import ray
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        started.add_node(num_cpus=1)
        ray.init(address=started.address, log_to_driver=False)
        yield started
        ray.shutdown()
        started.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_a_ray_node_that_is_lost_costs_the_task_in_flight(tmp_path: Path, cluster: Any) -> None:
    job = Squares(str(tmp_path / "diary"), seconds=0.3)
    executor = Ray(cpus=1)
    assert executor.workers == 2
    found, tasks = {}, list(range(14))
    for number, result in executor.run(job, tasks):
        found[number] = result
        if len(found) == 4:
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    assert found == {number: number * number for number in tasks}
    assert len(_diary(tmp_path / "diary")) <= len(tasks) + 2


@pytest.mark.filterwarnings("ignore")
def test_a_table_from_ray_lands_in_the_store(tmp_path: Path, cluster: Any) -> None:
    findings = fxmerge.find_segments(fxmerge.trace(network(blocks=1), images(4)))
    proposals = fxmerge.propose(findings)[:2]
    with fxmerge.Store(tmp_path / "tables.db") as store:
        there = fxmerge.measure_importance(findings, proposals, images(16), executor=Ray(), store=store)
        again = fxmerge.measure_importance(findings, proposals, images(16), store=store)
    here = fxmerge.measure_importance(findings, proposals, images(16))
    assert there == again
    for name, importance in here.candidates.items():
        assert there.loss(name) == pytest.approx(importance.loss, rel=1e-4, abs=1e-7)
    with pytest.raises(NotFiniteError, match="nothing there"):
        list(Ray().run(Squares(str(tmp_path / "diary")), [-1]))
