"""What a user iterates over becomes batches of arguments, or is refused with the item and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxmerge
from fxmerge.errors import CalibrationError
from fxmerge.measure.calibration import as_batches, images_in, last_images


class Forward(nn.Module):
    """A convolution inside any forward."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), forward


class One(Forward):
    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


class Two(Forward):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(self.conv(x), y)


class Optional(Forward):
    def forward(self, x: Tensor, scale: Any = 1.0, y: Any = 0.0) -> Tensor:
        return self.function(self.conv(x * scale + y))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def one() -> GraphModule:
    return fxmerge.trace(One(torch.relu), X)


def two(second: Any) -> GraphModule:
    return fxmerge.trace(Two(lambda x, y: x * y), (X, second))


def test_images_come_in_batches_of_the_size_asked_for() -> None:
    batches = as_batches(torch.randn(7, 3, 8, 8), one(), batch_size=3, limit=5)
    assert [images_in(batch) for batch in batches] == [3, 2]


def test_an_argument_that_the_example_left_out_is_left_out() -> None:
    graph = fxmerge.trace(Optional(torch.relu), X)
    [batch] = as_batches([(X, torch.zeros(2))], graph)  # the second is a label
    assert torch.equal(batch[0], X)
    assert batch[1:] == (1.0, 0.0)


def test_an_optional_argument_that_the_example_gave_is_no_label() -> None:
    graph = fxmerge.trace(Optional(torch.relu), (X, torch.full((1,), 2.0)))
    [batch] = as_batches([(X, torch.full((1,), 3.0), 7), (X, torch.full((1,), 3.0), 7)], graph)
    assert [images_in(batch), batch[1].item()] == [4, 3.0]


def test_an_argument_by_keyword_keeps_its_place() -> None:
    graph = fxmerge.trace(Optional(torch.relu), X, {"y": X})
    [batch] = as_batches([(X, X + 1)], graph)
    assert batch[1] == 1.0
    assert torch.equal(batch[2], X + 1)


def test_a_number_is_given_to_every_batch() -> None:
    batches = as_batches([(X, 2.0), (X, 2.0)], two(2.0), batch_size=3)
    assert [batch[1] for batch in batches] == [2.0, 2.0]


def test_one_value_for_all_images_must_be_the_same_in_every_item() -> None:
    with pytest.raises(CalibrationError, match="item 1 gives y another value than item 0"):
        as_batches([(X, 2.0), (X, 3.0)], two(2.0))


def test_whole_scoring_takes_what_the_batches_hold() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, factor: float, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x * factor)))

    findings = fxmerge.find_segments(fxmerge.trace(Net(), (2.0, X)))
    table = fxmerge.measure_importance(findings, fxmerge.propose(findings), [(2.0, torch.randn(16, 3, 8, 8))])
    assert {importance.samples for importance in table.candidates.values()} == {4}  # a quarter is held out, and judged on


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (X.double(), r"item 0 is torch\.float64; the network was traced with torch\.float32: convert it"),
        (X.half(), r"item 0 is torch\.float16; the network was traced with torch\.float32"),
        ((X * 50).to(torch.uint8), r"item 0 is torch\.uint8"),
        (X.to(torch.complex64), r"item 0 is torch\.complex64"),
        ([X, X.double()], r"item 1 is torch\.float64"),
        (X.to("meta"), "item 0 is on the meta device, without values"),
        (
            torch.sparse_coo_tensor(size=(4, 3, 8, 8), check_invariants=True),
            r"item 0 is of layout torch\.sparse_coo: give ordinary tensors",
        ),
        (torch.empty(4, 3, 0, 8), r"item 0 has shape \(4, 3, 0, 8\); the network was traced with \(2, 3, 8, 8\)"),
        ([(X, X, 1)], r"item 0 holds 3 values; the network takes 1: x \(a label may follow\)"),
    ],
)
def test_tensors_that_the_network_cannot_take_are_refused(item: object, text: str) -> None:
    with pytest.raises(CalibrationError, match=text):
        as_batches(item, one())


def test_arguments_of_unequal_length_are_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match=r"item 0 holds unequal numbers of entries \(\{'x': 2, 'y': 4\}\)"):
        as_batches([(X, torch.randn(4, 4, 6, 6))], two(torch.randn(2, 4, 6, 6)))


def test_a_network_without_tensors_has_nothing_to_calibrate_with() -> None:
    graph = one()
    graph.graph.find_nodes(op="placeholder")[0].meta.clear()
    with pytest.raises(CalibrationError, match="the network takes no tensor"):
        as_batches(X, graph)


def test_images_of_a_size_that_the_network_rejects_are_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    findings = fxmerge.find_segments(fxmerge.trace(model, X))
    with pytest.raises(
        CalibrationError, match=r"rejects calibration inputs of size \(3, 3, 10, 10\): .*shapes cannot be multiplied"
    ):
        fxmerge.measure_importance(findings, fxmerge.propose(findings), torch.randn(4, 3, 10, 10))


class Timed(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.relu(x + (t.view(-1, 1, 1, 1) if t.dim() else t))


FOUR = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class TestTimeSteps:
    @pytest.mark.parametrize("time", [7, torch.tensor(7), torch.tensor([7])])
    def test_one_for_all_images_of_an_item_where_the_network_takes_one_for_each(self, time: object) -> None:
        graph = fxmerge.trace(Timed(), (FOUR, torch.arange(4)))
        [batch] = as_batches([(FOUR, time), (FOUR, torch.arange(4))], graph)
        assert sorted(batch[1].tolist()) == [0, 1, 2, 3, 7, 7, 7, 7]
        by_time = {int(t): x for x, t in zip(*batch, strict=True)}
        assert all(torch.equal(by_time[t], FOUR[t]) for t in range(4))  # each image keeps its time

    def test_items_of_different_times_share_no_batch_where_it_takes_one_for_all(self) -> None:
        graph = fxmerge.trace(Timed(), (FOUR, torch.tensor(3)))
        batches = as_batches([(FOUR, torch.tensor(t)) for t in (5, 5, 8, 5)], graph, batch_size=6)
        assert sorted((images_in(batch), int(batch[1])) for batch in batches) == [(2, 5), (4, 5), (4, 8), (6, 5)]
        assert sorted((images_in(b), int(b[1])) for b in as_batches([(FOUR, 5), (FOUR, 8)], graph, limit=6)) == [(2, 8), (4, 5)]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 7, 9])
def test_the_last_images_are_taken_across_batches_and_what_is_one_for_all_stays_whole(count: int) -> None:
    graph = fxmerge.trace(Two(lambda x, t: x * t), (X, torch.ones(())))
    data = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 8, 8)
    found = last_images([(part, torch.ones(())) for part in data.split(3)], graph, count)
    assert [int(image[0, 0, 0]) for x, _ in found for image in x] == list(range(max(0, 7 - count), 7))
    assert all(t.shape == () for _, t in found)


@pytest.mark.parametrize("items", [1, 16])
def test_data_in_some_order_is_mixed_always_alike_and_nothing_is_lost(items: int) -> None:
    """Given sorted, be it as one tensor or batch by batch, a part of it is of all sorts."""
    sort = torch.arange(512.0).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    given = sort if items == 1 else list(sort.split(512 // items))
    found, again = (as_batches(given, one()) for _ in range(2))
    order = torch.cat([batch[0][:, 0, 0, 0] for batch in found])
    assert order.sort().values.tolist() == list(range(512))
    assert torch.equal(order, torch.cat([batch[0][:, 0, 0, 0] for batch in again]))
    assert all(6 < sum(64 * k <= i < 64 * (k + 1) for i in order[:128].tolist()) < 30 for k in range(8))
    kept = torch.cat([batch[0][:, 0, 0, 0] for batch in as_batches(given, one(), seed=None)])
    assert kept.tolist() == list(range(512))


def test_batches_that_cannot_be_joined_are_mixed_as_wholes() -> None:
    graph = two(torch.tensor(2.0))
    items = [(X, torch.tensor(float(number))) for number in range(20)]
    order = [float(batch[1]) for batch in as_batches(items, graph)]
    assert sorted(order) == list(range(20))
    assert order != sorted(order)


def test_what_made_the_images_is_not_held() -> None:
    made = X.clone().requires_grad_() * 2
    [(batch,)] = as_batches(made, one(), seed=None)
    assert not batch.requires_grad
    assert torch.equal(batch, made)
