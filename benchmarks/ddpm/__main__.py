"""Two benchmarks of diffusion U-Nets; see ``small`` and ``configuration``.

    python -m benchmarks.ddpm small --cache ~/.cache/fxmerge-ddpm --out benchmarks/results/ddpm_small.md
    python -m benchmarks.ddpm cifar-configuration --batch 1 --out benchmarks/results/ddpm_cifar.md

Needs the extra ``benchmarks``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.ddpm import configuration, small
from benchmarks.reports import deliver


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ddpm", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    for name, module in (("small", small), ("cifar-configuration", configuration)):
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        module.add_options(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    report: str = options.run(options)
    deliver(report, options.out)
    return report


if __name__ == "__main__":
    main()
