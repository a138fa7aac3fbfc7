"""A merged network in the place of its model, called as the model is; and in a pipeline of diffusers'."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

import fxmerge
from fxmerge import InputError, in_place_of
from tests.fakes import PriceTimer
from tests.unets import MODELS, noise, times, unet


@dataclass
class Pair:
    image: Tensor

    def to_tuple(self) -> tuple[Tensor]:
        return (self.image,)


class Timed(nn.Module):
    """Takes a time for each image, a factor, and options that change nothing, or the form of the output."""

    config = "what others ask for"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.seen: list[str] = ["a"]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, t: Tensor, factor: float = 1.0, extra: Any = None, return_dict: bool = True) -> Any:
        return self.conv(x) * factor + t.view(-1, 1, 1, 1)


X, T = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0])


class Network(nn.Module):
    """What was captured of the above."""

    def __init__(self, model: Timed, wrap: bool = False) -> None:
        super().__init__()
        self.model, self.wrap = copy.deepcopy(model), wrap

    def forward(self, x: Tensor, t: Tensor) -> Any:
        y = self.model(x, t)
        return Pair(y) if self.wrap else y


@pytest.fixture
def model() -> Timed:
    torch.manual_seed(0)
    return Timed().eval()


def test_it_is_of_the_models_class_and_has_its_attributes_and_none_of_its_weights(model: Timed) -> None:
    there = in_place_of(model, Network(model).double(), (X, T))
    assert isinstance(there, Timed)
    assert (there.config, there.seen, there.dtype) == (model.config, ["a"], torch.float64)
    assert {name.partition(".")[0] for name, _ in there.named_parameters()} == {"merged"}
    assert not hasattr(there, "conv")


def test_it_is_called_by_position_and_by_keyword(model: Timed) -> None:
    there = in_place_of(model, Network(model), (X, T))
    expected = model(X, T)
    for found in (there(X, T), there(X, t=T), there(t=T, x=X), there(X, T, 1.0, None), there(X, t=T, extra=None)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("time", [2.0, 2, torch.tensor(2.0)])
def test_one_number_serves_all_images(model: Timed, time: Any) -> None:
    there = in_place_of(model, Network(model), (X, T))
    assert torch.equal(there(X, time), model(X, torch.tensor([2.0, 2.0])))


def test_the_form_of_the_output_is_as_asked_for(model: Timed) -> None:
    there = in_place_of(model, Network(model, wrap=True), (X, T))
    assert type(there(X, T)) is type(there(X, T, return_dict=True)) is Pair
    assert torch.equal(there(X, T, return_dict=False)[0], model(X, T))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m(X, T, extra=3), "extra was not given when Timed was traced"),
        (lambda m: m(X, T, 2.0), "factor was not given when Timed was traced"),
        (lambda m: m(X, None), "Timed was traced with t: give it"),
        (lambda m: m(X, T[:, None]), "t has 2 dimensions; the network was traced with 1"),
        (lambda there: there(X, "now"), "t was a tensor when Timed was traced; found 'now'"),
    ],
)
def test_what_the_network_was_not_traced_for_is_refused(model: Timed, call: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        call(in_place_of(model, Network(model), (X, T)))


def test_a_constant_of_the_graph_cannot_be_another(model: Timed) -> None:
    graph = fxmerge.trace(model, (X, T, 2.0), front_end="export")
    there = in_place_of(model, graph, (X, T, 2.0))
    assert torch.allclose(there(X, T, factor=2.0), model(X, T, 2.0))
    with pytest.raises(InputError, match=r"factor is 2\.0 in the merged network, as it was traced with; found 3\.0"):
        there(X, T, factor=3.0)


def test_an_example_that_does_not_fit_is_refused(model: Timed) -> None:
    with pytest.raises(InputError, match="are not what Timed takes: missing a required argument: 't'"):
        in_place_of(model, Network(model), X)


@pytest.mark.parametrize("pair", [(Timed, nn.Identity()), (3, nn.Identity()), (None, nn.Identity()), (nn.Identity(), None)])
def test_what_is_no_module_is_refused(pair: Any) -> None:
    with pytest.raises(InputError, match="two modules; found"):
        in_place_of(*pair, torch.zeros(1))


def test_it_is_copied_pickled_and_moved_like_any_module(model: Timed) -> None:
    there = in_place_of(model, Network(model), (X, T))
    for twin in (copy.deepcopy(there), pickle.loads(pickle.dumps(there))):
        assert torch.equal(twin(X, T), model(X, T))
        twin.double()
        assert twin(X.double(), T.double()).dtype == torch.float64
    assert there(X, T).dtype == torch.float32


@pytest.mark.parametrize("name", ["conditional", "decoder"])
def test_diffusers_models_called_by_keyword(name: str) -> None:
    build, inputs = MODELS[name]
    model, given = build().double(), inputs(2, (8, 8), 0)
    there = in_place_of(model, fxmerge.trace(model, given), given)
    names = ("sample", "timestep", "encoder_hidden_states")
    expected, found = (m(**dict(zip(names, given, strict=False)), **_plain(name)) for m in (model, there))
    assert torch.allclose(expected[0], found[0])


def _plain(name: str) -> dict[str, bool]:
    return {"return_dict": False} if name == "conditional" else {}


def test_a_pipelines_unet_is_compressed_put_back_and_sampled_with_ddim() -> None:
    """The example of the README."""
    torch.manual_seed(0)
    pipeline: Any = DDIMPipeline(unet(), DDIMScheduler(num_train_timesteps=1000))  # type: ignore[no-untyped-call]
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    example = noise(4, 3, 8, 8).float(), times(4)

    inputs = fxmerge.recorded_inputs(pipeline.unet, lambda: pipeline(batch_size=8, num_inference_steps=6, output_type="np"))
    scorer = fxmerge.NoisePrediction(images=noise(8, 3, 8, 8).float().clamp(-1, 1), signal=pipeline.scheduler.alphas_cumprod)
    space = fxmerge.Space(max_kernel=3)
    result = fxmerge.compress(
        pipeline.unet, example, speedup=1.2, calibration=inputs, scorer=scorer, space=space, timer=PriceTimer()
    )
    before = pipeline(batch_size=2, generator=generator.manual_seed(0), num_inference_steps=3, output_type="np").images
    pipeline.unet = result.in_place_of(pipeline.unet)
    after = pipeline(batch_size=2, generator=generator.manual_seed(0), num_inference_steps=3, output_type="np").images

    assert result.plan.merges
    assert type(pipeline.unet).__name__ == "UNet2DModel"
    assert before.shape == after.shape == (2, 8, 8, 3)
    assert 0 < abs(before - after).mean() < 0.2


def test_a_network_that_torch_export_read_says_that_it_cannot_be_moved() -> None:
    model = unet().float()
    given = noise(2, 3, 8, 8).float(), times(2)
    there = in_place_of(model, fxmerge.trace(model, given), given).double()
    with pytest.raises(fxmerge.InputError, match="was read by torch.export in torch.float32 on cpu.* moved to torch.float64"):
        there(noise(2, 3, 8, 8).double(), times(2))
