"""torch.compile(model, backend="fxmerge"): found without an import, merges what is exact and pays, never computes stale weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmerge.backend import fxmerge
from fxmerge.compress import compress
from tests.fakes import PriceTimer

EAGER = {"inner": "eager"}


class Branches(nn.Module):
    """A RepVGG block in its training form."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.three, self.bn3 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.one, self.bn1 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.bn0 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn3(self.three(x)) + self.bn1(self.one(x)) + self.bn0(x))


@pytest.fixture(autouse=True)
def _fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("fxmerge.backend.compress", partial(compress, timer=PriceTimer()))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="fxmerge.backend")
    return caplog


def model() -> nn.Module:
    made = nn.Sequential(Branches(), Branches()).train()
    made(torch.randn(4, 16, 8, 8))
    return made.eval()


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def test_the_backend_is_registered_without_an_import() -> None:
    assert "fxmerge" in torch._dynamo.list_backends(None)


def test_branches_are_merged_and_the_result_is_the_same(log: pytest.LogCaptureFixture) -> None:
    network, x = model(), torch.randn(2, 16, 8, 8)
    compiled = torch.compile(network, backend=fxmerge, options=EAGER)
    with torch.no_grad():
        found = compiled(x)
    assert close(found, network(x))
    assert "2 exact merges" in log.text


def scale(network: Any) -> None:
    for parameter in network.parameters():
        parameter.mul_(1.5)


def give_new_storage(network: Any) -> None:
    for parameter in network.parameters():
        parameter.data = parameter.data * 1.5


def load_by_assignment(network: Any) -> None:
    network.load_state_dict({name: value * 1.5 for name, value in network.state_dict().items()}, assign=True)


def replace_a_parameter(network: Any) -> None:
    network[0].three.weight = nn.Parameter(1.5 * network[0].three.weight)


def replace_a_module(network: Any) -> None:
    network[0].three = nn.Conv2d(16, 16, 3, padding=1, bias=False)


def write_a_buffer(network: Any) -> None:
    network[1].bn0.running_mean.add_(1)


def gather_statistics(network: Any) -> None:
    """Batch norms write their statistics without that torch counts it."""
    network.train()(torch.randn(4, 16, 8, 8))
    network.eval()


@pytest.mark.parametrize(
    "change",
    [scale, give_new_storage, load_by_assignment, replace_a_parameter, replace_a_module, write_a_buffer, gather_statistics],
)
def test_weights_that_change_afterwards_are_never_ignored(change: Callable[[Any], None], log: pytest.LogCaptureFixture) -> None:
    network, x = model(), torch.randn(2, 16, 8, 8)
    compiled = torch.compile(network, backend=fxmerge, options=EAGER)
    with torch.no_grad():
        before = compiled(x)
        change(network)
        assert close(compiled(x), network(x))
        assert not close(compiled(x), before)
    assert "weights changed after compiling" in log.text


def test_a_plain_tensor_that_is_replaced_after_a_write_is_not_ignored() -> None:
    class Shifted(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.randn(1, 16, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.shift

    network, x = Shifted().eval(), torch.randn(2, 16, 8, 8)
    compiled = torch.compile(network, backend=fxmerge, options=EAGER)
    with torch.no_grad():
        for change in (lambda: None, lambda: network.shift.mul_(2), lambda: setattr(network, "shift", torch.randn(1, 16, 1, 1))):
            change()
            assert close(compiled(x), network(x))


def test_like_blocks_that_are_compiled_one_by_one_keep_their_own_weights(log: pytest.LogCaptureFixture) -> None:
    network, x = model(), torch.randn(2, 16, 8, 8)
    expected = copy.deepcopy(network)
    with torch.no_grad():
        for block in network.children():
            block.compile(backend=fxmerge, options=EAGER)
        assert close(network(x), expected(x))
        assert close(network(x), expected(x))
    assert "1 exact merges" in log.text


def test_the_merged_network_runs_again_after_another_model_came_by() -> None:
    one, other, x, calls = model(), model(), torch.randn(2, 16, 8, 8), []

    def counted(graph: Any, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls.append(sum("conv" in str(node.target) or "merged" in str(node.target) for node in graph.graph.nodes))
            return graph(*arguments)

        return run

    compiled = torch.compile(lambda network, x: network(x), backend=fxmerge, options={"inner": counted})
    with torch.no_grad():
        for network in (one, other, one):
            assert close(compiled(network, x), network(x))
    assert calls[0] == calls[2] < calls[1]


class Counting(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(16))


class CountsCalls(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return super().forward(x)


class KeepsItsOutput(Counting):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen.copy_(y.mean((0, 2, 3)))
        return y


class ScalesItsInput(Counting):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return super().forward(x)


class ActivatesItsInput(Counting):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.relu(x, inplace=True))


@pytest.mark.parametrize("kind", [CountsCalls, KeepsItsOutput, ScalesItsInput, ActivatesItsInput])
def test_a_graph_that_writes_into_buffers_or_inputs_is_left_alone(kind: type[Counting], log: pytest.LogCaptureFixture) -> None:
    network, x = kind().eval(), torch.randn(2, 16, 8, 8)
    twin, y = copy.deepcopy(network), x.clone()
    compiled = torch.compile(network, backend=fxmerge, options=EAGER)
    with torch.no_grad():
        for _ in range(2):
            assert close(compiled(x), twin(y))
            assert torch.equal(x, y)
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), twin.buffers(), strict=True))
    assert "writes into its inputs or buffers" in log.text


def test_batch_norms_in_train_mode_still_gather_their_statistics() -> None:
    network, x = model().train(), torch.randn(2, 16, 8, 8)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        assert close(torch.compile(network, backend=fxmerge, options=EAGER)(x), twin(x))
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), twin.buffers(), strict=True))


def test_modules_in_train_mode_are_left_alone(log: pytest.LogCaptureFixture) -> None:
    network, x = nn.Sequential(model()[0], nn.Dropout(0.5)).train(), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        fxmerge(torch.fx.symbolic_trace(network), [x], options=EAGER)
    assert "modules are in train mode" in log.text
    assert all(module.training for module in network.modules())


def test_a_model_made_in_inference_mode_runs(log: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode():
        network, x = model(), torch.randn(2, 16, 8, 8)
        assert close(torch.compile(network, backend=fxmerge, options=EAGER)(x), network(x))
    assert "cannot be watched for changes" in log.text


def test_a_model_run_in_inference_mode_is_merged(log: pytest.LogCaptureFixture) -> None:
    network = model()
    with torch.inference_mode():
        x = torch.randn(2, 16, 8, 8)
        assert close(torch.compile(network, backend=fxmerge, options=EAGER)(x), network(x))
    assert "2 exact merges" in log.text


def test_nothing_is_merged_where_gradients_are_wanted(log: pytest.LogCaptureFixture) -> None:
    network, x = model(), torch.randn(2, 16, 8, 8)
    compiled = torch.compile(network, backend=fxmerge, options=EAGER)
    compiled(x).sum().backward()
    assert network[0].three.weight.grad is not None  # type: ignore[index,union-attr]
    assert "gradients are wanted" in log.text


def test_a_network_without_convolutions_is_compiled_as_it_is(log: pytest.LogCaptureFixture) -> None:
    network, x = nn.Linear(4, 4), torch.randn(2, 4)
    compiled = torch.compile(network, backend=fxmerge, options=EAGER)
    with torch.no_grad():
        assert torch.equal(compiled(x), network(x))
    assert "nothing is merged" in log.text


def test_the_inner_back_end_is_the_one_asked_for() -> None:
    asked = []

    def inner(graph: Any, inputs: Any) -> Any:
        asked.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(model(), backend=fxmerge, options={"inner": inner})(torch.randn(2, 16, 8, 8))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"options": {"inner": "nonsense"}}, "there is no back end 'nonsense'"),
        ({"options": {"inner": "eager", "typo": 1}}, "knows the option 'inner' only, found 'typo'"),
        ({"mode": "max-autotune"}, "knows no modes, found 'max-autotune'"),
    ],
)
def test_an_unknown_option_is_told(given: dict[str, Any], text: str) -> None:
    with torch.no_grad(), pytest.raises(Exception, match=text):  # TorchDynamo's BackendCompilerFailed, which quotes ours
        torch.compile(model(), backend=fxmerge, **given)(torch.randn(2, 16, 8, 8))
