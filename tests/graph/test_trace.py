"""From model to graph: what it computes, what it leaves alone, and one clear error for every input that cannot be used."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxmerge.errors import FxMergeError, InputError, NotFiniteError, TraceError
from fxmerge.graph.meta import facts, front_end
from fxmerge.graph.trace import propagate_shapes, require_shapes, trace
from tests import zoo
from tests.laws import relative_error
from tests.zoo import Net, conv, images, specimen

IMAGE = torch.zeros(1, 3, 12, 12)


class TestWhatAGraphComputes:
    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_it_is_what_the_model_computes_at_other_sizes_too(self, name: str) -> None:
        model = specimen(name)
        graph = trace(model, images(name))
        for size in ((12, 12), (11, 13)):
            x = images(name, size=size, batch=3, seed=1)
            assert relative_error(model(x.clone()), graph(x)) < 1e-14

    def test_it_is_the_model_in_eval_mode_whatever_mode_the_model_is_in(self) -> None:
        model = specimen("dropout").train()
        graph = trace(model, images())
        assert not any(module.training for module in graph.modules())
        assert relative_error(copy.deepcopy(model).eval()(images(seed=1)), graph(images(seed=1))) < 1e-14

    def test_every_tensor_has_its_shape_and_its_place_in_the_model(self) -> None:
        graph = trace(specimen("option_a_skip"), images())
        known = {node.name: facts(node) for node in graph.graph.nodes}
        assert known["x"].shape == (2, 3, 12, 12)
        assert known["getitem"].shape == (2, 3, 6, 6)
        assert known["pad"].shape == (2, 6, 6, 6)
        assert known["conv1"].dtype == torch.float64
        assert (known["conv1"].target, known["pad"].target) == ("conv1", "pad")
        assert known["pad"].source.startswith(zoo.__file__)

    def test_keyword_arguments_and_defaults_reach_the_model(self) -> None:
        class Scaled(nn.Module):
            def forward(self, x: Tensor, scale: float = 2.0, *, shift: Tensor | None = None) -> Tensor:
                return x * scale + shift

        graph = trace(Scaled(), torch.ones(2), {"shift": torch.ones(1)})
        assert torch.equal(graph(torch.ones(2), shift=torch.ones(1)), torch.full((2,), 3.0))

    def test_several_inputs_and_outputs_in_a_dict_are_fine(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
                return {"sum": x + y, "product": x * y}

        found = trace(Two(), (torch.ones(2), torch.ones(2)))(torch.ones(2), torch.full((2,), 3.0))
        assert torch.equal(found["sum"], torch.full((2,), 4.0))
        assert torch.equal(found["product"], torch.full((2,), 3.0))

    def test_a_network_traced_by_someone_else_gives_the_same_graph(self) -> None:
        model = specimen("residual_plus_equals")
        theirs = fx.symbolic_trace(model)
        before = str(theirs.graph)
        graph = trace(theirs, images())
        assert str(graph.graph) == str(trace(model, images()).graph)
        assert str(theirs.graph) == before

    def test_a_graph_can_be_traced_again(self) -> None:
        graph = trace(specimen("overwritten_skip"), images())
        again = trace(graph, images())
        assert str(again.graph) == str(graph.graph)

    def test_lower_precision_is_fine(self) -> None:
        trace(specimen("residual_plus").bfloat16(), images().bfloat16())


class TestWhatIsLeftAlone:
    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_keeps_weights_statistics_and_mode(self, training: bool) -> None:
        model = specimen("dropout").train(training)
        model[1].train(not training)
        modes = [module.training for module in model.modules()]
        before = copy.deepcopy(model.state_dict())
        graph = trace(model, images())
        graph.eval()
        for parameter in graph.parameters():
            parameter.data.zero_()
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_the_example_is_not_overwritten_by_an_activation_on_it(self) -> None:
        x = images()
        trace(nn.Sequential(nn.ReLU(inplace=True), conv(3, 4)).double(), x)
        assert torch.equal(x, images())

    def test_the_example_is_not_overwritten_by_any_operation_on_it(self) -> None:
        x = images()
        trace(Net(lambda s, x: s.a(x.mul_(2)), a=conv(3, 4)).double(), x)
        assert torch.equal(x, images())

    def test_the_example_is_not_overwritten_by_a_module_on_it(self) -> None:
        x = images()
        trace(nn.Sequential(nn.SELU(inplace=True), conv(3, 4)).double(), x)
        assert torch.equal(x, images())

    def test_the_generator_of_random_numbers_is_where_it_was(self) -> None:
        model = specimen("dropout")
        state = torch.random.get_rng_state()
        trace(model, images())
        assert torch.equal(torch.random.get_rng_state(), state)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Looping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[2]):
            x = x + 1
        return x


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.max())):
            x = x + 1
        return x


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class NotANumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x - 1)


class HiddenAlias(nn.Module):
    """Writes through a view, which no symbolic trace can see."""

    def forward(self, x: Tensor) -> Tensor:
        y = x - 1
        y.view(-1).relu_()
        return y


class TestWhatCannotBeTraced:
    @pytest.mark.parametrize("thing", [lambda x: x, nn.Conv2d, {}, None], ids=["function", "class", "dict", "None"])
    def test_something_that_is_no_module_is_shown(self, thing: Any) -> None:
        with pytest.raises(TraceError, match=r"^expected a torch\.nn\.Module to trace, found (function|type|dict|NoneType): "):
            trace(thing, IMAGE)

    @pytest.mark.parametrize(
        ("model", "code"),
        [(Branching(), r"\(if x\.sum\(\) > 0:\)"), (Counting(), r"\(for _ in range\(int\(x\.max\(\)\)\):\)")],
        ids=["if", "for"],
    )
    def test_control_flow_on_values_or_sizes_is_named_by_its_line(self, model: nn.Module, code: str) -> None:
        name = type(model).__name__
        with pytest.raises(TraceError, match=rf"^{name} cannot be traced at .*test_trace\.py:\d+ {code}: .*rewrite that line"):
            trace(model, IMAGE)

    @pytest.mark.parametrize("model", [Random(), HiddenAlias(), NotANumber()], ids=["random in eval mode", "hidden alias", "NaN"])
    def test_a_graph_that_computes_something_else_is_not_handed_out(self, model: nn.Module) -> None:
        with pytest.raises(TraceError, match="^the traced graph does not compute what the model does .*random in eval mode"):
            trace(model, -torch.ones(2, 3))

    def test_an_alias_written_by_an_augmented_assignment_is_not_handed_out(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            x = s.a(x)
            y = x
            y += s.b(x)
            return y * x

        model = Net(forward, a=conv(3, 4), b=conv(4, 4))
        with pytest.raises(TraceError, match="writes into tensors that it reads under another name"):
            trace(model, images().float(), front_end="symbolic_trace")
        graph = trace(model, images().float())
        assert front_end(graph) == "export"
        assert relative_error(model(images(seed=1).float()), graph(images(seed=1).float())) < 1e-6

    def test_a_model_that_cannot_be_copied_says_why(self) -> None:
        model = conv(3, 4)
        model.cache = torch.zeros(1, requires_grad=True) * 2
        with pytest.raises(TraceError, match="^the model cannot be copied.*Only Tensors created explicitly by the user"):
            trace(model, IMAGE)

    def test_a_lazy_module_that_has_seen_no_input_is_one_of_our_errors(self) -> None:
        with pytest.raises(FxMergeError, match="uninitialized"):
            trace(nn.LazyConv2d(4, 3), IMAGE)


class TestInputs:
    @pytest.mark.parametrize("given", [3, "image", (), [], None, {"x": IMAGE}], ids=repr)
    def test_anything_but_a_tensor_or_arguments_is_an_error(self, given: Any) -> None:
        with pytest.raises(InputError, match=r"^example inputs must be a tensor or a tuple of arguments, found \w+$"):
            trace(conv(3, 4), given)

    def test_inputs_that_the_model_rejects_are_shown_with_its_words(self) -> None:
        text = r"^the model rejects the example inputs of size \(1, 4, 12, 12\) \(float32\).*: Given groups=1, weight of size"
        with pytest.raises(InputError, match=text):
            trace(conv(3, 4), torch.zeros(1, 4, 12, 12))

    def test_the_line_of_the_model_that_rejects_them_is_named(self) -> None:
        model = Net(lambda s, x: torch.cat((x, s.a(x)), 1), a=conv(3, 4, stride=2))
        with pytest.raises(InputError, match=r"at .*test_trace\.py:\d+ \(model = Net\(lambda s, x: torch\.cat.*Sizes of tensors"):
            trace(model, IMAGE)

    def test_another_dtype_is_shown(self) -> None:
        with pytest.raises(InputError, match=r"size \(1, 3, 12, 12\) \(float64\)"):
            trace(conv(3, 4), IMAGE.double())

    def test_too_many_and_too_few_arguments_are_errors(self) -> None:
        for given in ((IMAGE, IMAGE), [IMAGE] * 3):
            with pytest.raises(InputError, match="the model rejects the example inputs of size .*, size .*positional argument"):
                trace(conv(3, 4), given)

    def test_a_list_is_as_good_as_a_tuple(self) -> None:
        assert len(trace(conv(3, 4), [IMAGE]).graph.nodes) == 3


class TestFiniteness:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["0.weight", "1.running_var", "1.bias"])
    def test_the_tensor_that_is_not_finite_is_named(self, where: str, value: float) -> None:
        model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4))
        model.state_dict()[where].view(-1)[2] = value
        size = model.state_dict()[where].numel()
        text = rf"^1 of {size} values of {where} are NaN or infinite; repair or retrain the weights first$"
        with pytest.raises(NotFiniteError, match=text) as caught:
            trace(model, IMAGE)
        assert caught.value.where == where


class TestShapes:
    def test_inputs_that_a_graph_rejects_are_shown(self) -> None:
        graph = trace(conv(3, 4), IMAGE)
        with pytest.raises(InputError, match=r"^the graph rejects inputs of size \(1, 5, 12, 12\) \(float32\): Given groups"):
            propagate_shapes(graph, (torch.zeros(1, 5, 12, 12),))

    def test_a_missing_argument_is_named(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x + y

        graph = trace(Two(), (IMAGE, IMAGE))
        with pytest.raises(InputError, match="argument 'y' is missing"):
            propagate_shapes(graph, (IMAGE,))

    def test_shapes_are_required_of_a_graph(self) -> None:
        graph = fx.symbolic_trace(conv(3, 4))
        with pytest.raises(InputError, match="carries no shapes"):
            require_shapes(graph)
        propagate_shapes(graph, (IMAGE,))
        require_shapes(graph)


def test_a_functional_network_keeps_the_keys_of_its_state_dict() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)

    model = Functional()
    assert list(trace(model, IMAGE).state_dict()) == list(model.state_dict())


def test_code_of_torchvision_is_the_users_own_not_torchs() -> None:
    """Its folder's name begins with that of torch."""
    torchvision = pytest.importorskip("torchvision")
    graph = trace(torchvision.models.squeezenet1_1(weights=None).eval(), torch.randn(1, 3, 64, 64))
    lines = {facts(node).source for node in graph.graph.nodes if node.op.startswith("call_")}
    assert "" not in lines
    assert any("torchvision" in line and "squeezenet.py:" in line for line in lines)


def test_a_norm_left_in_train_mode_inside_a_model_in_eval_mode_is_read_in_eval_mode_and_stays_as_it_was() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4)).eval()
    model[1].train()
    before = model[1].running_mean.clone()
    graph = trace(model, IMAGE)
    assert model[1].training
    assert torch.equal(model[1].running_mean, before)
    twin = nn.Sequential(*model).eval()
    assert relative_error(twin(IMAGE), graph(IMAGE)) < 1e-6


class Annotated(nn.Module):
    """Its annotations are text, for this file imports them from the future."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_a_graph_of_a_model_whose_annotations_are_text_goes_through_pickle() -> None:
    graph = trace(Annotated(), IMAGE)
    assert not any(isinstance(node.type, str) for node in graph.graph.nodes)  # torch 2.11 cannot
    assert torch.equal(pickle.loads(pickle.dumps(graph))(IMAGE), graph(IMAGE))
