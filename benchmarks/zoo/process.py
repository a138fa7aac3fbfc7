"""A process of its own for every model; one that hangs or runs out of memory is a row, too."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import resource
import signal
import time
import traceback
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fxmerge
from benchmarks.zoo.check import examine
from benchmarks.zoo.models import entries
from benchmarks.zoo.report import Row

SOURCE = Path(fxmerge.__file__).parent


def in_a_process(name: str, timeout: float, memory: float, alone: bool) -> Row:
    """What a process of its own finds out about a model, as far as it gets."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fxmerge", "timm", "segmentation_models_pytorch", "diffusers"])  # imported once for all
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, memory, alone, sender), daemon=True)
    start = time.perf_counter()
    process.start()
    sender.close()
    row: Row = {"id": name, "source": source(), "began": time.time(), "stage": "start"}
    try:
        while receiver.poll(max(0.0, timeout - time.perf_counter() + start)):
            row.update(receiver.recv())
        row["fault"] = f"not done within {timeout:.0f} s"
    except EOFError:
        process.join(10)
        if row["stage"] != "done" and "fault" not in row:
            row |= {"fault": f"the process ended with code {process.exitcode}", "memory": process.exitcode == -signal.SIGKILL}
    finally:
        process.kill()
        process.join()
    return row | {"seconds": time.perf_counter() - start}


@cache
def source() -> str:
    """A hash of fxmerge's source as it is when the run begins: rows of one table may stem from several states of it."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def _work(name: str, memory: float, alone: bool, sender: Any) -> None:
    """The process: send what is known as it comes to be known, and a fault, if there is one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        entry = next(entry for entry in entries() if entry.id == name)
        for news in examine(entry, memory, alone=alone):
            sender.send(news)
    except Exception as fault:
        sender.send(_fault(fault))
    sender.send({"cpu_seconds": time.process_time()})


def _fault(fault: Exception) -> Row:
    """What went wrong: fxmerge's own words where it refuses, else the line as well; and whether memory was short."""
    refused = isinstance(fault, fxmerge.FxMergeError)
    where = traceback.extract_tb(fault.__traceback__)[-1]
    text = str(fault)[:200] if refused else f"{type(fault).__name__} at {where.filename}:{where.lineno}: {fault}"[:300]
    return {"fault": text, "refused": refused, "memory": isinstance(fault, MemoryError) or "allocate memory" in str(fault)}
