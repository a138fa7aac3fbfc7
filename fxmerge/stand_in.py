"""A merged network behind the call, and among the attributes, of the model it was made from.

A graph is called as it was traced; who uses the model calls it in other ways: arguments by keyword, a number for a time step, no
dataclass around the output; and asks it for its configuration, its dtype, its device. What :func:`in_place_of` makes is of the
model's own class and has its attributes, with the merged network as its only part.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.errors import InputError
from fxmerge.graph.meta import front_end
from fxmerge.graph.trace import as_arguments

#: The argument by which models of Hugging Face's libraries are asked for a dataclass or a tuple; it changes nothing else.
_FORM = "return_dict"


def in_place_of(
    model: nn.Module, network: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """An object of the model's class, called as the model is, that runs the merged network.

    Args:
        model: what was traced; it is not changed, and none of its weights are kept.
        network: the merged network, or its student.
        example_inputs, example_kwargs: what the model was traced with. What was not given there must keep its default.

    Returns:
        A module with the model's attributes, methods and type. A number, or a tensor without dimensions, is repeated where the
        network was traced with one entry for each image (a time step). Methods that ask for the model's own layers fail.

    Raises:
        InputError: these are no modules, or the example does not fit the model's signature; when called, that the arguments
            are others than those traced with, or that what was a constant for the graph has another value, dtype and device
            of a network read by torch.export among them.
        TypeError: when called, as the model's own signature raises it.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3))
    >>> standing_in = in_place_of(model, nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8))
    >>> type(standing_in).__name__, standing_in(input=torch.zeros(2, 3, 8, 8)).shape
    ('Sequential', torch.Size([2, 4, 6, 6]))
    """
    for found in (model, network):
        if not isinstance(found, nn.Module):
            what = found.__name__ if isinstance(found, type) else type(found).__name__
            raise InputError(f"in_place_of takes the model and the merged network, two modules; found {what}")
    signature = inspect.signature(model.forward)
    arguments = as_arguments(example_inputs)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    try:
        example = signature.bind(*arguments, **(example_kwargs or {})).arguments
    except TypeError as fault:
        raise InputError(f"the example inputs are not what {type(model).__name__} takes: {fault}") from fault
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        raise InputError(f"{type(model).__name__}.forward takes any number of arguments: call the merged network itself")
    shell = type(model).__new__(type(model))
    nn.Module.__init__(shell)
    shell.__dict__.update({key: value for key, value in model.__dict__.items() if key not in shell.__dict__})
    shell.add_module("merged", network)
    shell.training = network.training
    constant = isinstance(network, GraphModule) and front_end(network) != "symbolic_trace"
    shell.__dict__["forward"] = _Call(network, type(model).__name__, signature, example, len(arguments), constant)
    return shell


@dataclass(frozen=True, eq=False)
class _Call:
    """What runs in place of the model's forward.

    Args:
        network: what is run.
        name: of the model's class.
        signature: of the model's forward.
        example: what the network was traced with, by name.
        positional: how many of these were given by position.
        constant: whether what is no tensor has become part of the graph.
    """

    network: nn.Module
    name: str
    signature: inspect.Signature
    example: Mapping[str, Any]
    positional: int
    constant: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(*args, **kwargs).arguments
        form = given.pop(_FORM, None) if _FORM not in self.example else None
        for name, value in given.items():
            if name not in self.example and not self._is_default(name, value):
                raise InputError(f"{name} was not given when {self.name} was traced: trace it with {name}, or leave it out")
        images = max((value for value in given.values() if isinstance(value, Tensor)), key=Tensor.dim, default=None)
        values = {name: self._ready(name, given, images) for name in self.example}
        names = list(values)
        by_name = {name: values[name] for name in names[self.positional :]}
        try:
            output = self.network(*(values[name] for name in names[: self.positional]), **by_name)
        except Exception as fault:
            self._check_not_moved(fault)
            raise
        return self._formed(output, form)

    def _check_not_moved(self, fault: Exception) -> None:
        """Of a graph from torch.export, dtype and device are constants; moved, it fails somewhere inside."""
        traced = next((v for v in self.example.values() if isinstance(v, Tensor) and v.is_floating_point()), None)
        now = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        if self.constant and traced is not None and now is not None and (now.dtype, now.device) != (traced.dtype, traced.device):
            raise InputError(
                f"{self.name} was read by torch.export in {traced.dtype} on {traced.device}, which are constants in the merged "
                f"network, and it was moved to {now.dtype} on {now.device}: move the model first, then compress it there"
            ) from fault

    def _is_default(self, name: str, value: Any) -> bool:
        default = self.signature.parameters[name].default
        return value is default or (not isinstance(value, Tensor) and type(value) is type(default) and bool(value == default))

    def _ready(self, name: str, given: Mapping[str, Any], images: Tensor | None) -> Any:
        """The value of an argument as the network was traced to take it."""
        wanted = self.example[name]
        value = given.get(name, self.signature.parameters[name].default)
        if value is inspect.Parameter.empty or (value is None and wanted is not None):
            raise InputError(f"{self.name} was traced with {name}: give it")
        if not isinstance(wanted, Tensor):
            if self.constant and (isinstance(value, Tensor) or value != wanted):
                raise InputError(f"{name} is {wanted!r} in the merged network, as it was traced with; found {value!r:.80}")
            return value
        if not isinstance(value, Tensor):
            try:
                value = torch.tensor(value, dtype=wanted.dtype, device=None if images is None else images.device)
            except (TypeError, ValueError, RuntimeError) as fault:
                raise InputError(f"{name} was a tensor when {self.name} was traced; found {value!r:.80}") from fault
        if value.dim() == 0 and wanted.dim() == 1 and images is not None:
            value = value.expand(len(images))
        if value.dim() != wanted.dim():
            raise InputError(f"{name} has {value.dim()} dimensions; the network was traced with {wanted.dim()}")
        return value

    def _formed(self, output: Any, form: bool | None) -> Any:
        """The output as a dataclass or as a tuple, if either was asked for."""
        if form is False and hasattr(output, "to_tuple"):
            return output.to_tuple()
        if form is True and type(output) is tuple:
            raise InputError(f"the network was traced with {_FORM}=False and gives tuples: trace it without")
        return output
