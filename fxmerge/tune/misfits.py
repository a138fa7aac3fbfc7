"""Where a batch, the networks and the loss do not fit each other, and how that is told.

Networks, data, loss and metric are other people's; whatever they raise is a fact to be told with what was given, and where. What is
no matter of fit, the end of memory, goes through as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxmerge.errors import FxMergeError, InputError
from fxmerge.graph.meta import facts
from fxmerge.measure.labelled import check_labels, shapes, short

_PASS = (FxMergeError, torch.OutOfMemoryError, MemoryError)


@contextmanager
def told(describe: Callable[[], str]) -> Iterator[None]:
    """Whatever is raised inside becomes an InputError that begins with what ``describe`` says; it is asked only then."""
    try:
        yield
    except _PASS:
        raise
    except Exception as fault:
        facts_told = describe()
        raise InputError(facts_told if str(fault) in facts_told else f"{facts_told}: {short(fault)}") from fault


@contextmanager
def found_in(where: Callable[[], str]) -> Iterator[None]:
    """Put before an InputError in which batch it was; what was its cause stays so."""
    try:
        yield
    except InputError as fault:
        raise InputError(f"{where()}: {fault}") from (fault.__cause__ or fault)


def cannot_take(who: str, network: Any, inputs: Sequence[Any]) -> str:
    """That a network does not take these arguments, and which it was traced with."""
    known = traced_with(network)
    wanted = f"; it was traced with {known}: give images of such channels, dtype and size" if known else ""
    return f"the {who} cannot take inputs {shapes(tuple(inputs))}{wanted}"


def traced_with(network: Any) -> str:
    """Shapes and dtypes of the example inputs of a graph; empty where they are not known."""
    if not isinstance(network, GraphModule):
        return ""
    known = [facts(node) for node in network.graph.nodes if node.op == "placeholder"]
    empty = [torch.empty(f.shape, dtype=f.dtype, device="meta") for f in known if f.shape is not None and f.dtype is not None]
    return shapes(tuple(empty)) if empty else ""


def cannot_compare(what: str, outputs: Any, labels: Any) -> str:
    """That outputs and labels do not go together, and why, as far as it can be seen."""
    return f"the {what} cannot compare outputs {shapes(outputs)} with labels {shapes(labels)}{_wrong_labels(outputs, labels)}"


def _wrong_labels(outputs: Any, labels: Any) -> str:
    """Of outputs that could be logits and labels that could be classes: what is wrong with the labels."""
    if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)) or outputs.dim() < 2 or labels.is_floating_point():
        return ""
    try:
        check_labels(labels, outputs)
    except (ValueError, RuntimeError) as fault:  # of a GPU that has failed already no tensor can be read
        return f" ({fault})" if isinstance(fault, ValueError) else ""
    return ""


def require_mean(loss: Any, what: str = "loss") -> Tensor:
    """What a loss gave, if it is one number that has a gradient to give.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(f"{what} must give one number, a mean over the batch; found {shapes(loss)}")
    return loss
