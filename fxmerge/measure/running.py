"""A module as a target runs it: device, dtype, memory format, threads, back end; and the device to itself while it is timed."""

from __future__ import annotations

import copy
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from torch.utils import _pytree as pytree

from fxmerge.core.table import Target
from fxmerge.errors import InputError

Run = Callable[..., object]
Inputs = tuple[Any, ...]

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def prepare(module: nn.Module, inputs: Inputs, target: Target) -> tuple[Run, Inputs]:
    """The module and its inputs as the target runs them; call the result under ``torch.no_grad()``.

    The module itself comes back where nothing is to convert or compile, else a converted copy. With a back end it is
    compiled here, for these shapes, the target's threads and no gradients; inductor gets the weights as constants.

    Args:
        module: any module; it is not changed.
        inputs: floating point ones get the target's dtype, 4-D ones its memory format.
        target: where and how it will run.

    Raises:
        InputError: the target cannot be had here.

    >>> target = Target(dtype="bfloat16", channels_last=True)
    >>> run, [image] = prepare(nn.Conv2d(3, 8, 3), (torch.zeros(1, 3, 16, 16),), target)
    >>> image.dtype, image.stride()
    (torch.bfloat16, (768, 1, 48, 3))
    """
    with running_on(target):
        ready = _converted(module, target)
        moved = _each_tensor(lambda tensor: _moved(tensor, target), inputs)
        return (ready if target.backend == "eager" else _compiled(ready, moved, target.backend)), moved


def copies(sources: Inputs) -> Callable[[], Inputs]:
    """What gives the inputs anew, their tensors copied."""
    return lambda: _each_tensor(torch.Tensor.clone, sources)


def versions(target: Target) -> dict[str, str]:
    """Of python and torch, and the name of the processor, with the threads in use, or of the GPU."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.device(target.device).type == "cuda":
        return found | {"device": torch.cuda.get_device_name(target.device)}
    return found | {"device": _processor(), "threads": str(target.threads or torch.get_num_threads())}


@contextmanager
def running_on(target: Target) -> Iterator[None]:
    """No gradients, the target's threads and GPU; afterwards all as it was. InputError if the target cannot be had."""
    device = _device(target)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(target.threads or threads)
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def alone_on(device: str) -> Iterator[None]:
    """Wait until no other timer of this user runs on this device of this machine, and keep others waiting.

    Raises:
        InputError: the file that they agree by cannot be made.
    """
    kind, _, index = device.partition(":")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"fxmerge-{user}"
    try:
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{kind}-{index or 0}.lock", is_singleton=True)  # whoever holds it may take it again
        lock.acquire()
    except OSError as fault:
        raise InputError(f"{folder}, by which timers wait for each other, cannot be used ({fault}): set TMPDIR") from fault
    try:
        yield
    finally:
        lock.release()


def _device(target: Target) -> torch.device:
    if target.dtype not in DTYPES:
        raise InputError(f"unknown dtype {target.dtype!r}; possible are {', '.join(DTYPES)}")
    if target.threads < 0:
        raise InputError(f"{target.threads} threads; possible are 1 and more, or 0 for torch's own setting")
    if target.backend != "eager" and target.backend not in (known := torch._dynamo.list_backends(None)):
        raise InputError(f"unknown back end {target.backend!r}; torch.compile knows {', '.join(known)}")
    kind, _, index = target.device.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
        raise InputError(f"unknown device {target.device!r}; possible are cpu, cuda, cuda:0, ...")
    if kind == "cuda" and int(index or 0) >= (gpus := torch.cuda.device_count()):
        raise InputError(f"device {target.device!r} is not here: torch sees {gpus} GPUs; cpu is always possible")
    return torch.device(target.device)


def laid_out(tensor: torch.Tensor, target: Target) -> torch.Tensor:
    """The tensor in the target's memory format, if it has four dimensions."""
    return tensor.contiguous(memory_format=_layout(target)) if tensor.dim() == 4 else tensor


def _layout(target: Target) -> torch.memory_format:
    return torch.channels_last if target.channels_last else torch.contiguous_format


def _moved(tensor: torch.Tensor, target: Target) -> torch.Tensor:
    dtype = DTYPES[target.dtype] if tensor.is_floating_point() else tensor.dtype
    return laid_out(tensor.to(target.device, dtype), target)


def _each_tensor(function: Callable[[torch.Tensor], torch.Tensor], inputs: Inputs) -> Inputs:
    """The inputs with every tensor in them, lists and the like gone into, put through a function."""
    mapped: Inputs = pytree.tree_map_only(torch.Tensor, function, inputs)
    return mapped


def _converted(module: nn.Module, target: Target) -> nn.Module:
    fits = all(_moved(tensor, target) is tensor for tensor in [*module.parameters(), *module.buffers()])
    if fits and not any(part.training for part in module.modules()):
        return module
    copied = copy.deepcopy(module).eval()
    return copied.to(target.device, DTYPES[target.dtype]).to(memory_format=_layout(target))


def _compiled(module: nn.Module, inputs: Inputs, backend: str) -> Run:
    def forward(*given: Any) -> object:
        return module(*given)

    # Dynamo counts recompilations by code object and gives up after 8, so every module gets a code object of its own.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{id(module)}")
    run: Run = torch.compile(forward, backend=backend, dynamic=False)
    # Freezing is looked up while tracing, that is on the first call: an option of torch.compile would come too late.
    with torch._inductor.config.patch(freezing=True) if backend == "inductor" else nullcontext():
        run(*copies(inputs)())
    return run


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
