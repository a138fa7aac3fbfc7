"""Random weights under which nothing is exactly zero or one, and values stay of order one at any depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def randomise(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Random numbers wherever there is a constant; statistics and, where need be, weights that keep values of order one."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            _draw(parameter.data)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            for name in ("weight", "bias"):
                value = getattr(module, name, None)
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    _draw(value)  # a frozen norm's
    _observed(model, example, _set_statistics)
    scale = _largest(model, example)
    if not 1e-4 < scale < 1e4:
        _observed(model, example, _scale_layer)
        scale = _largest(model, example)
    if not 0 < scale < math.inf:
        raise ValueError(f"the largest output is {scale}; no random weights were found that mend that")


def _draw(value: Tensor) -> None:
    """Random numbers in place of a constant: near one for one, of moderate size for anything smaller."""
    constant = float(value.flatten()[0])
    if abs(constant) >= 0.5:
        value.copy_(constant * (0.5 + torch.rand_like(value)))
    elif value.squeeze().dim() > 1:  # a layer that begins as zero
        value.copy_(torch.randn_like(value) / math.sqrt(value[0].numel()))
    else:
        value.copy_(0.1 + 0.4 * torch.rand_like(value)).mul_(torch.randint_like(value, 2) * 2 - 1)


def _set_statistics(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Give a batch norm the statistics of what it sees, disturbed, and let what follows see the result."""
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor) or not inputs or inputs[0].shape[1] != len(mean):
        return None
    axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
    found, average = torch.var_mean(inputs[0], axes, correction=0)
    found = torch.where(found > 1e-3 * found.mean(), found, found.mean()).clamp_min(1e-6)
    mean.copy_(average + 0.3 * found.sqrt() * torch.randn_like(mean))
    variance.copy_(found * (0.5 + torch.rand_like(variance)))
    return module.forward(*inputs)


def _scale_layer(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Give a layer with weights an output of order one."""
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or not isinstance(output, Tensor):
        return None
    scale = float(output.std())
    if not 0 < scale < math.inf:
        return None
    for parameter in module.parameters(recurse=False):
        parameter.data.div_(scale)
    return module.forward(*inputs)


def _observed(model: nn.Module, example: tuple[Any, ...], hook: Callable[..., Any]) -> None:
    handles = [module.register_forward_hook(hook) for module in model.modules()]
    with torch.no_grad():
        model(*mapped(torch.clone, example))
    for handle in handles:
        handle.remove()


def _largest(model: nn.Module, example: tuple[Any, ...]) -> float:
    """The largest value among all outputs; infinite where one is not finite, 0 where there is none."""
    largest = [x.abs().max() for x in outputs(model, example) if x.is_floating_point() and x.numel()]
    return float(torch.stack(largest).nan_to_num(math.inf).max()) if largest else 0.0


def outputs(module: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a module returns for copies of these arguments."""
    with torch.no_grad():
        values = module(*mapped(torch.clone, arguments))
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def mapped(function: Callable[[Tensor], Tensor], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(pytree.tree_map_only(Tensor, function, arguments))
