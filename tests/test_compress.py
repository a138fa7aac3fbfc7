"""The whole story: budgets, exactness, what is left untouched, and every kind of bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.algebra.affine import Affine, scaling
from fxmerge.core.geometry import Geometry
from fxmerge.operators import Activation, Map, Site, Verdict, channelwise, default_operators
from fxmerge.testing import assert_equivalent, assert_untouched, snapshot
from tests.fakes import PriceTimer
from tests.small import images, network


def compressed(speedup: float = 1.4, **options: object) -> fxmerge.Result:
    arguments = {"speedup": speedup, "calibration": images(64), "timer": PriceTimer(), **options}
    return fxmerge.compress(network(), images(4), **arguments)  # type: ignore[arg-type]


def test_a_budget_is_met_and_student_and_merged_network_agree() -> None:
    result = compressed(1.4)
    assert result.speedup >= 1.4 / 1.03
    assert result.plan.merges
    result.student.double()
    merged = fxmerge.fuse(result.student)
    for size in ((2, 3, 12, 12), (1, 3, 9, 15), (3, 3, 17, 8)):
        assert_equivalent(result.student, merged, [torch.randn(size, dtype=torch.float64)])


def test_the_model_given_is_untouched_in_weights_and_mode() -> None:
    model = network().train()
    before = snapshot(model)
    fxmerge.compress(model, images(4), speedup=1.3, calibration=images(32), timer=PriceTimer())
    assert_untouched(model, before)
    assert all(module.training for module in model.modules())


def test_a_fitted_plan_stays_closer_to_the_original_than_a_composed_one() -> None:
    model, data = network(), images(64, seed=5)
    reference = model(data)
    errors = {}
    for space in ("joint", "activations"):
        result = fxmerge.compress(model, images(4), speedup=1.3, calibration=images(128), timer=PriceTimer(), space=space)  # type: ignore[arg-type]
        errors[space] = float(((result.model(data) - reference).norm() / reference.norm()).detach())
    assert errors["joint"] < errors["activations"]


def test_the_published_objective_is_an_option_and_the_plan_says_so() -> None:
    result = compressed(objective="layermerge")
    assert result.plan.objective == "layermerge"
    assert "layermerge: layers less the sum of exp(change)" in fxmerge.explain(result.plan)


@pytest.mark.parametrize(("name", "value"), [("speedup", 1.25), ("fraction", 0.8), ("latency_ms", None)])
def test_a_budget_is_a_speedup_a_fraction_or_milliseconds(name: str, value: float | None) -> None:
    graph = fxmerge.trace(network(), images(4))
    original = PriceTimer()([fxmerge.Timed(fxmerge.baseline(graph), (images(4),))], target=fxmerge.Target())[0].median_ns
    asked = value if value is not None else 0.8 * original / 1e6
    result = compressed(**{"speedup": None, name: asked})  # type: ignore[arg-type]
    assert result.measured[1].median_ns <= 0.8 * original * 1.03


def test_an_exact_compression_keeps_the_function_and_takes_only_merges_that_pay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    model.double().eval()
    x = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    result = fxmerge.compress(model, x, exact=True, timer=PriceTimer())
    assert [merge.exact for merge in result.plan.merges] == [True]
    assert len([m for m in result.model.modules() if isinstance(m, nn.Conv2d)]) == 2
    assert_equivalent(model, result.model, [x, torch.randn(1, 3, 6, 7, dtype=torch.float64)])


def test_an_exact_merge_that_is_slower_is_not_taken() -> None:
    model = nn.Sequential(nn.Conv2d(96, 4, 1, bias=False), nn.Conv2d(4, 96, 1)).eval()
    result = fxmerge.compress(model, torch.randn(8, 96, 24, 24), exact=True, timer=PriceTimer())
    assert not result.plan.merges


def test_training_form_branches_become_one_convolution_exactly() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.three, self.bn3 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.one, self.bn1 = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
            self.bn0 = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn3(self.three(x)) + self.bn1(self.one(x)) + self.bn0(x))

    model = nn.Sequential(Branches(), Branches()).double().train()
    model(torch.randn(8, 6, 9, 9, dtype=torch.float64))
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    result = fxmerge.compress(model, x, exact=True, timer=PriceTimer())
    assert len([m for m in result.model.modules() if isinstance(m, nn.Conv2d)]) == 2
    assert_equivalent(model.eval(), result.model, [x])


class Gain(nn.Module):
    """A leaf that scales channels: an operator of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0, 2.0, 3.0, 1.5, 0.1]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain[:, None, None]


class GainOperator:
    def verdict(self, site: Site) -> Verdict:
        return Map(Geometry.identity(site.channels, site.dims))

    def affine(self, site: Site) -> Affine:
        return scaling(site.module.gain.detach().double(), torch.zeros(site.channels, dtype=torch.float64), site.dims)

    def unpad(self, site: Site) -> None:
        return


def with_gain(*between: nn.Module) -> fx.GraphModule:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Gain) or super().is_leaf_module(m, module_qualified_name)

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), *between, nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)]
    model = nn.Sequential(*layers).double().eval()
    return fx.GraphModule(model, Leaves().trace(model))


@pytest.mark.parametrize("options", [{"exact": True}, {"space": "composed", "speedup": 1.2}, {"speedup": 1.2}])
def test_an_operator_of_the_users_is_known_all_the_way(options: dict[str, object]) -> None:
    x = images(2).double()
    data = {} if "exact" in options else {"calibration": images(32).double()}
    table = default_operators().extended(modules={Gain: GainOperator()})
    result = fxmerge.compress(with_gain(Gain()), x, timer=PriceTimer(), operators=table, **options, **data)  # type: ignore[arg-type]
    assert result.plan.merges
    assert not [m for m in (*result.model.modules(), *result.baseline.modules()) if isinstance(m, Gain)]
    assert_equivalent(result.student, result.model, [x])


def test_an_activation_of_the_users_that_is_a_module_is_kept_behind_its_merge() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(2 * x)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Twice) or super().is_leaf_module(m, module_qualified_name)

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), Twice(), nn.Conv2d(6, 6, 3)).eval()
    graph = fx.GraphModule(model, Leaves().trace(model))
    table = default_operators().extended(modules={Twice: channelwise(lambda site: Activation("twice"))})
    result = fxmerge.compress(graph, images(2), speedup=1.2, calibration=images(32), timer=PriceTimer(), operators=table)
    assert result.plan.merges
    assert_equivalent(result.student, result.model, [images(2)])


def test_under_inference_mode_the_student_can_still_be_trained() -> None:
    with torch.inference_mode():
        result = compressed(1.3)
    result.student.train()(images(4)).sum().backward()
    assert all(parameter.grad is not None for parameter in result.student.parameters())


def test_the_global_random_numbers_are_not_used_up() -> None:
    model, before = network(), torch.get_rng_state()
    fxmerge.compress(model, images(4), speedup=1.3, calibration=images(32), timer=PriceTimer())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:nothing can be merged")
def test_an_argument_that_is_no_tensor_is_measured_with() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(blocks=1)

        def forward(self, x: Tensor, factor: float) -> Tensor:
            y: Tensor = self.net(x * factor)
            return y

    timer = fxmerge.InterleavedTimer(rounds=1, warmup=1, max_runs_per_sample=1)
    result = fxmerge.compress(Scaled().eval(), (images(2), 2.0), exact=True, timer=timer)
    assert result.speedup > 0


def test_exact_and_a_budget_are_two_wishes() -> None:
    with pytest.raises(fxmerge.InputError, match="give exact=True, which takes whatever pays, or a budget; found both"):
        fxmerge.compress(network(blocks=1), images(4), exact=True, speedup=2.0, timer=PriceTimer())


def test_outputs_that_say_nothing_of_single_images_are_named() -> None:
    model = nn.Sequential(network(), nn.Softmax(0), nn.Flatten(0))
    with pytest.raises(fxmerge.InputError, match=r"each of the 16 images, .* Found output: float32 \(80,\)"):
        fxmerge.compress(model, images(4), speedup=1.2, calibration=images(64), timer=PriceTimer())


def test_too_little_calibration_data_is_told_with_how_much_would_do() -> None:
    with pytest.warns(
        UserWarning, match=r"^1 calibration images are too few: .* times as many weights .* Give at least \d+, better"
    ):
        compressed(calibration=images(1))


def test_the_report_names_both_networks_and_the_prediction() -> None:
    text = compressed().report()
    for part in ("original, folded", "merged", "predicted", "measured", "Plan:"):
        assert part in text


# --- bad input, each told by its text ---------------------------------------------------------------------------------------


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(fxmerge.TraceError, match=r"expected a torch\.nn\.Module to trace, found function"):
        fxmerge.compress(lambda x: x, images(4), speedup=1.2, calibration=images(8))  # type: ignore[arg-type]


def test_inputs_that_the_model_rejects_are_named_with_their_size() -> None:
    with pytest.raises(fxmerge.InputError, match=r"the model rejects the example inputs of size \(4, 5, 12, 12\)"):
        fxmerge.compress(network(), torch.randn(4, 5, 12, 12), speedup=1.2, calibration=images(8))


def test_a_network_without_convolutions_says_so() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 5))
    with pytest.raises(fxmerge.NothingToMergeError, match="holds no convolution"):
        fxmerge.compress(model, images(4), speedup=1.2, calibration=images(8))


def test_a_network_in_which_nothing_merges_comes_back_folded_with_a_warning() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.MaxPool2d(2)).eval()
    with pytest.warns(UserWarning, match="nothing can be merged"):
        result = fxmerge.compress(model, images(4), speedup=1.0, calibration=images(8), timer=PriceTimer())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())
    assert_equivalent(model, result.model, [images(4)])


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        (None, "no calibration given"),
        ([], "calibration is empty"),
        (torch.zeros(0, 3, 12, 12), "calibration is empty"),
        (torch.randn(8, 4, 12, 12), r"item 0 has shape \(8, 4, 12, 12\); the network was traced with"),
        ([torch.randn(3, 12, 12), torch.randn(3, 9, 12)], "differ in size"),
        (torch.full((4, 3, 12, 12), math.nan), "holds NaN or infinity"),
        (3, "must be a tensor of images or an iterable"),
        (["image.png"], "item 0 is a str"),
        ([(1, 2, 3)], "holds 3 values; the network takes 1"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused(calibration: object, text: str) -> None:
    with pytest.raises(fxmerge.CalibrationError, match=text):
        fxmerge.compress(network(), images(4), speedup=1.2, calibration=calibration, timer=PriceTimer())


def test_labels_in_the_calibration_are_dropped() -> None:
    pairs = [(image, 3) for image in images(32)]
    result = fxmerge.compress(network(), images(4), speedup=1.2, calibration=pairs, timer=PriceTimer())
    assert result.plan.merges


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = network()
    model[3].conv1.weight.data[0, 0, 0, 0] = value  # type: ignore[index,union-attr]
    with pytest.raises(fxmerge.NotFiniteError, match=r"1 of 576 values of 3\.conv1\.weight are NaN or infinite") as caught:
        fxmerge.compress(model, images(4), speedup=1.2, calibration=images(8))
    assert caught.value.where == "3.conv1.weight"


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({}, "give one budget"),
        ({"speedup": 1.2, "fraction": 0.5}, "found speedup and fraction"),
        ({"speedup": 0}, "speedup must be a positive number, found 0"),
        ({"speedup": 0.5}, "speedup must be at least 1, found 0.5"),
        ({"fraction": 0}, "fraction must be a positive number, found 0"),
        ({"fraction": 1.5}, "fraction must be above 0 and at most 1"),
        ({"latency_ms": -1}, "latency_ms must be a positive number, found -1"),
        ({"speedup": math.nan}, "speedup must be a positive number, found nan"),
        ({"speedup": "2x"}, "speedup must be a positive number, found '2x'"),
        ({"speedup": 10**400}, "speedup must be between 1e-9 and 1e12, found 1000000"),
        ({"latency_ms": 1e305}, r"latency_ms must be between 1e-9 and 1e12, found 1e\+305"),
        ({"latency_ms": 1e-320}, "latency_ms must be between 1e-9 and 1e12"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(budget: dict[str, object], text: str) -> None:
    with pytest.raises(fxmerge.InputError, match=text):
        fxmerge.compress(network(), images(4), calibration=images(8), **budget)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (
            {"space": "bogus"},
            "space must be an fxmerge.Space or one of joint, composed, activations, layers or exact, found 'bogus'",
        ),
        ({"objective": "accuracy"}, "objective must be one of additive-loss, layermerge, found 'accuracy'"),
        ({"space": None}, "space must be an fxmerge.Space or one of .*, found None"),
        ({"space": ["joint"]}, r"space must be .*, found \['joint'\]"),
        ({"target": "cpu"}, r"target must be an fxmerge.Target, such as Target\(device='cpu'\), found 'cpu'"),
        ({"tolerance": math.nan}, "tolerance must be a number from 0 on, found nan"),
        ({"tolerance": -0.1}, "tolerance must be a number from 0 on, found -0.1"),
        ({"corrections": 1.5}, "corrections must be a whole number from 0 on, found 1.5"),
        ({"corrections": -1}, "corrections must be a whole number from 0 on, found -1"),
        ({"trials": -1}, "trials must be a whole number from 0 on, found -1"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_before_any_work(option: dict[str, object], text: str) -> None:
    with pytest.raises(fxmerge.InputError, match=text):
        fxmerge.compress(network(), images(4), calibration=images(8), speedup=1.2, **option)  # type: ignore[arg-type]


def test_a_budget_out_of_reach_names_the_fastest_there_is() -> None:
    with pytest.raises(fxmerge.BudgetError, match=r"the fastest plan there is takes .* ms, measured") as caught:
        compressed(500.0)
    assert caught.value.fastest_ns > caught.value.asked_ns > 0


def test_control_flow_on_values_names_the_line_of_the_model() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # this line
                return self.conv(x)
            return x

    with pytest.raises(fxmerge.TraceError, match=r"test_compress\.py:\d+ \(if x\.sum\(\) > 0:.*this line"):
        fxmerge.compress(Branching(), images(4), speedup=1.2, calibration=images(8))
