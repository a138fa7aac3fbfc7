"""How far outputs are apart: of which of them, and what is said where none serves."""

from __future__ import annotations

import pytest
import torch

from fxmerge.errors import InputError
from fxmerge.measure.divergence import divergence

LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def test_equal_outputs_are_no_distance_apart() -> None:
    assert torch.equal(divergence(LOGITS, LOGITS), torch.zeros(4, dtype=torch.float64))


def test_features_count_by_their_relative_squared_error() -> None:
    features = torch.ones(2, 3, 4, 4)
    assert divergence(features, features * torch.tensor([1.0, 1.5]).view(2, 1, 1, 1)).tolist() == [0, 0.25]


@pytest.mark.parametrize("other", [LOGITS.t(), LOGITS.repeat(3, 1), torch.tensor(1.0), LOGITS.argmax(1), None, 5])
def test_an_output_that_says_nothing_of_single_images_is_left_out(other: object) -> None:
    alone = divergence({"y": LOGITS}, {"y": 2 * LOGITS}, images=4)
    both = divergence({"a": other, "y": LOGITS}, {"a": other, "y": 2 * LOGITS}, images=4)
    assert float(alone.min()) > 0
    assert torch.equal(alone, both)


def test_without_a_number_of_images_the_first_output_says_it() -> None:
    assert len(divergence((LOGITS, LOGITS.t()), (LOGITS, LOGITS.t()))) == 4


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ({"classes": LOGITS.argmax(1)}, r"output\['classes'\]: int64 \(4,\)"),
        (LOGITS.mean(), r"output: float32 \(\)"),
        ((LOGITS.t(), 3), r"output\[0\]: float32 \(3, 4\), output\[1\]: int"),
        (torch.complex(LOGITS, LOGITS), r"output: complex64 \(4, 3\)"),
        ([], "Found nothing"),
    ],
)
def test_outputs_none_of_which_serves_are_named(output: object, text: str) -> None:
    with pytest.raises(InputError, match=rf"no output holds floating-point numbers for each of the 4 images.*{text}"):
        divergence(output, output, images=4)
