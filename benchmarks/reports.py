"""What a benchmark found, for whoever waits for it."""

from __future__ import annotations

from pathlib import Path


def deliver(report: str, out: Path | None) -> None:
    """Print a report, and write it to a file if one was asked for."""
    print(report)  # noqa: T201
    if out is not None:
        out.write_text(report + "\n", encoding="utf-8")
