"""Every model of the zoo with random weights: is it read, what is found in it, and does the law hold?

    python -m benchmarks.zoo --workers 2

Every model has a process of its own; one that hangs or runs out of memory is a row, too. Rows are kept as they come in a file of
JSON lines, so a run that was interrupted goes on where it stopped (``--again`` runs anew what is in it). Models too large for a
worker's share of the memory are run alone, at the end. A model is run

1. with random weights, nothing in it exactly zero or one: parameters that are constant are drawn at random, and every batch norm
   gets the statistics of what it sees, disturbed, so that values stay of order one at any depth; where the output still vanishes
   or is not finite, every layer is scaled to an output of order one,
2. traced, searched, all candidates proposed,
3. and for three random plans of candidates that do not overlap the student is compared with the merged network, on the example,
   on another batch, and on another image size where the traced graph takes these.

A *residual add* adds two image tensors of one shape: one is a tensor, the fork, or computed from it by a row of layers without an
activation or maximum (the shortcut); the other is computed from the fork, too, with a convolution on the way; and nothing between
fork and addition enlarges the image. A *residual CNN* is a graph with a residual add and without attention: no function or
module whose name says attention, no matrix product of two tensors that both depend on the input. Names of models play no part. A
candidate *spans a block* if it is composed or fitted (not dropped) and its segment's expression has a sum with a convolution that
only one of the operands has behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from benchmarks.zoo import readme
from benchmarks.zoo.models import entries
from benchmarks.zoo.process import in_a_process, source
from benchmarks.zoo.report import Row, law_text, report, status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression on zoo:name")
    parser.add_argument("--limit", type=int, help="run no more than so many models")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model")
    parser.add_argument("--memory", type=float, help="GiB for all workers; most of the machine's if not given")
    parser.add_argument("--again", action="store_true", help="run anew what the store holds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "zoo.md")
    parser.add_argument("--store", type=Path, help="rows as JSON lines; benchmarks/zoo.jsonl if not given")
    options = parser.parse_args()
    store = options.store or Path(__file__).parents[1] / "zoo.jsonl"
    run(options, store)
    text = re.sub(r"/\S*/(site-packages|benchmarks)/", r"\1/", "\n\n".join(report(entries(), stored(store))))
    options.out.write_text(text + "\n", encoding="utf-8")
    if len(stored(store)) >= len(entries()):  # the README tells of whole runs
        readme.put(Path(__file__).parents[2] / "README.md", text)
    print(text.partition("\n## ")[0])  # noqa: T201


def run(options: argparse.Namespace, store: Path) -> None:
    """Run what the store lacks, several models at a time, and append their rows to it."""
    done = set() if options.again else stored(store).keys()
    wanted = [entry.id for entry in entries() if re.search(options.only, entry.id) and entry.id not in done]
    wanted = wanted[: options.limit]
    memory = options.memory or _machine_memory()
    source()
    heavy: list[str] = []
    with store.open("a", encoding="utf-8") as lines, tqdm(total=len(wanted)) as bar:

        def one(name: str, share: float, alone: bool) -> None:
            row = in_a_process(name, options.timeout, share, alone)
            if row.get("memory") and not alone:
                heavy.append(name)
                return
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            bar.set_postfix_str(f"{name}: {status(row)}, law {law_text(row)}")
            bar.update()

        with ThreadPoolExecutor(options.workers) as pool:
            jobs = [pool.submit(one, name, memory / options.workers, options.workers == 1) for name in wanted]
            try:
                for job in jobs:
                    job.result()
            except BaseException:  # what has begun is finished and kept
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for name in heavy:
            one(name, memory, alone=True)


def _machine_memory() -> float:
    return 0.85 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def stored(store: Path) -> dict[str, Row]:
    """The newest row of every model; a line that an interruption cut off does not count."""
    rows: dict[str, Row] = {}
    for line in store.read_text(encoding="utf-8").splitlines() if store.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row["id"]] = row
    return rows


if __name__ == "__main__":
    main()
