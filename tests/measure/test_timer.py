"""Times here come from a clock that only modules move, so nothing depends on the machine."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from fxmerge.core.table import Target
from fxmerge.errors import InputError, MeasurementError
from fxmerge.measure import timer as room
from fxmerge.measure.running import prepare, versions
from fxmerge.measure.timer import InterleavedTimer, Progress, Timed, compare

SHAPE = (1, 2, 4, 4)
MS = 1_000_000


@dataclass
class Clock:
    """Stands still unless a module moves it."""

    ns: int = 0
    log: list[str] = field(default_factory=list)

    def __call__(self) -> int:
        return self.ns


class Fake(nn.Module):
    """Writes its name into the clock's log and moves the clock, by the next cost of a sequence whose last one repeats."""

    def __init__(self, clock: Clock, name: str, *costs: int) -> None:
        super().__init__()
        self.clock, self.name, self.costs = clock, name, itertools.chain(costs, itertools.repeat(costs[-1]))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.log.append(self.name)
        self.clock.ns += next(self.costs)
        return x


class Spy(nn.Module):
    """Keeps what each run was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> None:
        self.seen.extend(tensor.clone() for tensor in inputs)


class Raises(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


def timed(*modules: nn.Module) -> list[Timed]:
    return [Timed(module, (SHAPE,)) for module in modules]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def rounds_of(log: Sequence[str], size: int) -> list[str]:
    return ["".join(log[start : start + size]) for start in range(0, len(log), size)]


class TestOrder:
    def test_every_round_times_every_module_and_the_order_reverses_and_turns(self, clock: Clock) -> None:
        fakes = [Fake(clock, name, 2 * MS) for name in "ABC"]
        InterleavedTimer(rounds=6, warmup=2, clock=clock)(timed(*fakes), target=Target())
        assert rounds_of(clock.log[6:], 3) == ["ABC", "CBA", "BCA", "ACB", "CAB", "BAC"]

    def test_warm_ups_come_first_and_do_not_count(self, clock: Clock) -> None:
        fakes = [Fake(clock, "A", 900 * MS, 800 * MS, 5 * MS), Fake(clock, "B", 700 * MS, 7 * MS)]
        first, second = InterleavedTimer(rounds=3, clock=clock)(timed(*fakes), target=Target())
        assert "".join(clock.log[:4]) == "AABB"
        assert (first.median_ns, second.median_ns) == (5 * MS, 7 * MS)

    def test_a_cheap_module_runs_again_in_a_round_but_after_the_others(self, clock: Clock) -> None:
        fakes = [Fake(clock, "A", MS // 3), Fake(clock, "B", 2 * MS), Fake(clock, "C", MS // 2)]
        measured = InterleavedTimer(rounds=1, warmup=1, clock=clock)(timed(*fakes), target=Target())
        assert "".join(clock.log) == "ABC" + "ABC" + "AC" + "A" + "A"
        assert [m.repeats for m in measured] == [1, 1, 1]

    def test_no_module_runs_more_often_in_a_round_than_allowed(self, clock: Clock) -> None:
        timer = InterleavedTimer(rounds=1, warmup=1, max_runs_per_sample=4, clock=clock)
        timer(timed(Fake(clock, "A", 0)), target=Target())
        assert len(clock.log) == 1 + 4

    def test_a_dear_module_gets_fewer_rounds_spread_over_all(self, clock: Clock) -> None:
        fakes = [Fake(clock, "A", 2 * MS), Fake(clock, "B", 250 * MS)]
        timer = InterleavedTimer(rounds=12, warmup=1, max_seconds_per_module=1.0, clock=clock)
        measured = timer(timed(*fakes), target=Target())
        assert "".join(clock.log[2:]) == "ABAAABAABAAABAAA"
        assert [m.repeats for m in measured] == [12, 4]

    def test_the_dearest_module_still_gets_three_rounds(self, clock: Clock) -> None:
        [found] = InterleavedTimer(rounds=12, clock=clock)(timed(Fake(clock, "A", 9_000 * MS)), target=Target())
        assert found.repeats == 3

    def test_compare_runs_each_network_once_a_round_however_fast(self, clock: Clock) -> None:
        measured = compare(timed(Fake(clock, "A", 0), Fake(clock, "B", 0)), target=Target(), rounds=4)
        assert rounds_of(clock.log[4:12], 2) == ["AB", "BA", "BA", "AB"]
        assert all(4 <= m.repeats <= 8 for m in measured)

    def test_on_a_gpu_the_runs_of_a_sample_lie_between_two_events(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[str] = []

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                log.append("record")

            def synchronize(self) -> None:
                log.append("wait")

            def elapsed_time(self, other: Event) -> float:
                return 0.0061 if other is not self else 0.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
        assert room._gpu_ns(lambda x: log.append("run"), [(torch.ones(1),)] * 3) == 2034
        assert log == ["synchronize", "record", "run", "run", "run", "record", "wait"]


class TestNumbers:
    def test_the_median_and_the_spread_are_integers_rounded_up(self, clock: Clock) -> None:
        timer = InterleavedTimer(rounds=4, warmup=1, max_runs_per_sample=1, clock=clock)
        [found] = timer(timed(Fake(clock, "A", 500, 1000, 1001, 1002, 1004)), target=Target())
        assert (found.median_ns, found.spread_ns, found.repeats) == (1002, 2, 4)  # of 1001.5, and of 1002.5 - 1000.75
        assert type(found.median_ns) is int
        assert type(found.spread_ns) is int

    def test_a_sample_is_the_median_of_its_runs_so_one_interruption_does_no_harm(self, clock: Clock) -> None:
        timer = InterleavedTimer(rounds=1, warmup=1, clock=clock)
        [found] = timer(timed(Fake(clock, "A", MS // 3, MS // 3, 900 * MS, MS // 3)), target=Target())
        assert found.median_ns == MS // 3

    def test_one_sample_has_no_spread(self, clock: Clock) -> None:
        [found] = InterleavedTimer(rounds=1, clock=clock)(timed(Fake(clock, "A", MS)), target=Target())
        assert (found.spread_ns, found.repeats) == (0, 1)

    def test_an_unsteady_module_is_measured_again_alone_until_it_is_steady(self, clock: Clock) -> None:
        unsteady = Fake(clock, "A", 10 * MS, 10 * MS, 30 * MS, 30 * MS, 10 * MS)
        measured = InterleavedTimer(rounds=4, warmup=1, clock=clock)(timed(unsteady, Fake(clock, "B", 9 * MS)), target=Target())
        assert "".join(clock.log[2 + 8 :]) == "AAAA"
        assert [(m.median_ns, m.repeats) for m in measured] == [(10 * MS, 8), (9 * MS, 4)]

    def test_a_module_that_never_gets_steady_is_measured_at_most_as_often_again(self, clock: Clock) -> None:
        wild = Fake(clock, "A", *(cost * MS for cost in [5, 90] * 50))
        [found] = InterleavedTimer(rounds=4, warmup=1, clock=clock)(timed(wild), target=Target())
        assert found.repeats == 8

    def test_a_dear_module_that_never_gets_steady_is_too(self, clock: Clock) -> None:
        wild = Fake(clock, "A", *(cost * MS for cost in [5_000, 9_000] * 50))
        [found] = InterleavedTimer(rounds=12, clock=clock)(timed(wild), target=Target())
        assert found.repeats == 6

    def test_the_measurement_says_where_and_with_what(self, clock: Clock) -> None:
        target = Target(threads=1)
        [found] = InterleavedTimer(rounds=1, clock=clock)(timed(Fake(clock, "A", MS)), target=target)
        assert found.target == target
        assert found.versions == versions(target)
        assert found.versions["torch"] == torch.__version__
        assert found.versions["threads"] == "1"
        assert found.versions["device"]

    def test_no_modules_no_measurements(self) -> None:
        assert InterleavedTimer()([], target=Target()) == ()

    def test_progress_counts_up_to_the_total(self, clock: Clock) -> None:
        heard: list[tuple[int, int]] = []
        tell: Progress = lambda done, total: heard.append((done, total))  # noqa: E731
        InterleavedTimer(rounds=2, clock=clock)(timed(Fake(clock, "A", MS), Fake(clock, "B", MS)), target=Target(), progress=tell)
        assert heard == [(1, 6), (2, 6), (4, 6), (6, 6)]


class TestInputs:
    def test_every_run_gets_its_input_afresh_even_if_the_module_overwrites_it(self) -> None:
        spy, given = Spy(), torch.randn(SHAPE)
        kept = given.clone()
        spy.register_forward_hook(lambda module, inputs, output: inputs[0].zero_())
        InterleavedTimer(rounds=2)([Timed(spy, (given,)), Timed(spy, (SHAPE,))], target=Target())
        assert torch.equal(given, kept)
        assert len(spy.seen) > 8
        assert all(tensor.abs().max() > 0.1 for tensor in spy.seen)

    def test_all_shapes_share_one_buffer_of_noise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[int] = []
        randn = torch.randn
        monkeypatch.setattr(torch, "randn", lambda n, **kw: (drawn.append(n), randn(n, **kw))[1])
        shapes = [(1, 2, 4, 4), (2, 3, 8, 8), (5,), (1, 2, 4, 4)]
        InterleavedTimer(rounds=1)([Timed(Spy(), (shape, shape)) for shape in shapes], target=Target())
        assert drawn == [2 * 3 * 8 * 8]

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_a_shape_is_a_view_of_the_noise_in_either_memory_format(self, channels_last: bool) -> None:
        target, noise = Target(channels_last=channels_last), torch.randn(400)
        source = room._Bench(InterleavedTimer(), target, noise)._source((2, 3, 8, 8))
        _, [moved] = prepare(nn.ReLU().eval(), (source,), target)
        assert moved.data_ptr() == noise.data_ptr()
        assert moved.shape == (2, 3, 8, 8)

    def test_an_input_is_gone_before_the_next_module_runs(self) -> None:
        alive: list[int] = []
        born: list[weakref.ref[torch.Tensor]] = []

        class Counts(Spy):
            def forward(self, *inputs: torch.Tensor) -> None:
                alive.append(sum(ref() is not None for ref in born))
                born.extend(weakref.ref(tensor) for tensor in inputs)

        InterleavedTimer(rounds=2)(timed(Counts(), Counts(), Counts()), target=Target())
        assert set(alive) == {0}

    def test_the_noise_is_standard_normal_and_the_seed_decides_it(self) -> None:
        spies = [Spy(), Spy(), Spy()]
        for spy, seed in zip(spies, (0, 0, 1), strict=True):
            InterleavedTimer(rounds=1, seed=seed)([Timed(spy, ((4, 4, 32, 32),))], target=Target())
        first, same, other = (spy.seen[0] for spy in spies)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
        assert abs(first.mean()) < 0.1
        assert abs(first.std() - 1) < 0.1

    def test_shapes_and_tensors_come_in_the_targets_dtype_and_memory_format(self) -> None:
        spy, target = Spy(), Target(dtype="float64", channels_last=True)
        InterleavedTimer(rounds=1)([Timed(spy, ((2, 3, 8, 8), torch.randn(2, 3, 8, 8), (2, 7)))], target=target)
        noise, image, flat = spy.seen[:3]
        assert noise.dtype == image.dtype == flat.dtype == torch.float64
        assert noise.stride() == image.stride() == (192, 1, 24, 3)
        assert flat.stride() == (7, 1)

    def test_an_input_of_integers_stays_one(self) -> None:
        spy = Spy()
        InterleavedTimer(rounds=1)([Timed(spy, (torch.arange(3),))], target=Target(dtype="bfloat16"))
        assert spy.seen[0].tolist() == [0, 1, 2]
        assert spy.seen[0].dtype == torch.int64


class TestPrepare:
    def test_the_given_module_stays_as_it_was(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        net[0].register_forward_hook(lambda *_: None)
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        InterleavedTimer(rounds=1)([Timed(net, ((2, 3, 8, 8),))], target=Target(dtype="float64", channels_last=True))
        assert all(part.training for part in net.modules())
        assert len(net[0]._forward_hooks) == 1
        assert net[0].weight.is_contiguous()
        assert net[0].weight.requires_grad
        for name, tensor in net.state_dict().items():
            assert tensor.dtype == state[name].dtype
            assert torch.equal(tensor, state[name])

    def test_a_module_that_fits_is_not_copied(self) -> None:
        net = nn.Conv2d(3, 4, 3).eval()
        image = torch.randn(1, 3, 8, 8)
        run, inputs = prepare(net, (image,), Target())
        assert run is net
        assert inputs == (image,)

    @pytest.mark.parametrize(
        ("target", "training"),
        [(Target(dtype="float64"), False), (Target(channels_last=True), False), (Target(), True)],
    )
    def test_a_module_that_does_not_fit_is_converted_in_a_copy(self, target: Target, training: bool) -> None:
        net = nn.Conv2d(3, 4, 3).train(training)
        run, _ = prepare(net, (torch.randn(1, 3, 8, 8),), target)
        assert isinstance(run, nn.Conv2d)
        assert run is not net
        assert not run.training
        assert run.weight.dtype == getattr(torch, target.dtype)
        assert run.weight.is_contiguous(memory_format=torch.channels_last) == target.channels_last

    def test_modules_of_one_class_are_each_compiled_for_themselves(self) -> None:
        compiled: list[bool] = []

        def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
            compiled.append(torch.is_grad_enabled())
            return graph

        torch._dynamo.register_backend(counting, name="counting_for_test_timer")
        modules = [Timed(nn.Conv2d(2, width, 1).eval(), ((1, 2, 4, width),)) for width in range(1, 11)]
        InterleavedTimer(rounds=2)(modules, target=Target(backend="counting_for_test_timer"))
        assert compiled == [False] * 10

    def test_modules_run_without_gradients(self) -> None:
        enabled: list[bool] = []
        spy = Spy()
        spy.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
        InterleavedTimer(rounds=1)(timed(spy), target=Target())
        assert set(enabled) == {False}
        assert torch.is_grad_enabled()


@pytest.mark.usefixtures("two_threads")
class TestThreads:
    def test_modules_run_with_the_targets_threads_which_are_then_given_back(self) -> None:
        found: list[int] = []
        spy = Spy()
        spy.register_forward_hook(lambda *_: found.append(torch.get_num_threads()))
        InterleavedTimer(rounds=1)(timed(spy), target=Target(threads=1))
        assert set(found) == {1}
        assert torch.get_num_threads() == 2

    def test_zero_threads_leaves_torchs_own_setting(self) -> None:
        found: list[int] = []
        spy = Spy()
        spy.register_forward_hook(lambda *_: found.append(torch.get_num_threads()))
        InterleavedTimer(rounds=1)(timed(spy), target=Target(threads=0))
        assert set(found) == {2}

    def test_threads_are_given_back_when_a_module_raises(self) -> None:
        with pytest.raises(MeasurementError, match="no such luck"):
            InterleavedTimer(rounds=1)(timed(Raises(ValueError("no such luck"))), target=Target(threads=1))
        assert torch.get_num_threads() == 2

    def test_an_interrupt_goes_through_as_it_is(self) -> None:
        with pytest.raises(KeyboardInterrupt):
            InterleavedTimer(rounds=1)(timed(Raises(KeyboardInterrupt())), target=Target(threads=1))
        assert torch.get_num_threads() == 2


class TestErrors:
    def test_a_module_that_cannot_run_is_named_with_its_place_and_cause(self) -> None:
        modules = [Timed(nn.Conv2d(2, 3, 1), (SHAPE,)), Timed(nn.Conv2d(5, 3, 1), (SHAPE,))]
        with pytest.raises(MeasurementError, match=r"module 1, Conv2d\(5, 3, .*expected input\[1, 2, 4, 4\]") as caught:
            InterleavedTimer(rounds=1)(modules, target=Target())
        assert caught.value.index == 1
        assert isinstance(caught.value, RuntimeError)
        assert isinstance(caught.value.__cause__, RuntimeError)

    def test_the_name_of_a_large_module_is_shortened(self) -> None:
        net = nn.Sequential(*(nn.Conv2d(5, 5, 1) for _ in range(100)))
        with pytest.raises(MeasurementError, match=r"^module 0, Sequential\( .{40,70} \[\.\.\.\], cannot be timed"):
            InterleavedTimer(rounds=1)(timed(net), target=Target())

    @pytest.mark.parametrize(
        ("target", "text"),
        [
            (Target(device="toaster"), "unknown device 'toaster'; possible are cpu, cuda"),
            (Target(device="cuda:x"), "unknown device 'cuda:x'; possible are cpu, cuda"),
            (Target(device="meta"), "unknown device 'meta'; possible are cpu, cuda"),
            (Target(dtype="int8"), "unknown dtype 'int8'; possible are float32, bfloat16, float16, float64"),
            (Target(threads=-1), "-1 threads; possible are 1 and more, or 0"),
            (Target(backend="tensorrt9"), "unknown back end 'tensorrt9'; torch.compile knows .*inductor"),
        ],
    )
    def test_a_target_that_does_not_exist_is_refused_with_what_there_is(self, target: Target, text: str) -> None:
        with pytest.raises(InputError, match=text):
            InterleavedTimer(rounds=1)([], target=target)
        with pytest.raises(InputError, match=text):
            prepare(nn.ReLU(), (), target)

    @pytest.mark.parametrize(("gpus", "device"), [(0, "cuda"), (1, "cuda:1")])
    def test_a_gpu_that_is_not_here_is_refused(self, gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        with pytest.raises(InputError, match=f"device '{device}' is not here: torch sees {gpus} GPUs"):
            compare([], target=Target(device=device))

    @pytest.mark.parametrize("name", ["rounds", "warmup", "max_runs_per_sample"])
    def test_a_count_below_one_is_refused(self, name: str) -> None:
        with pytest.raises(InputError, match=f"{name} is 0; it must be at least 1"):
            InterleavedTimer(**{name: 0})
