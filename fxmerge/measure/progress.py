"""Progress on standard error, or none: what the measuring rooms call back into."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeAlias

from tqdm import tqdm

#: Called with (done, total).
Progress: TypeAlias = Callable[[int, int], None]


class Bars:
    """A bar for every stage, shown while its stage runs.

    >>> with Bars(show=False) as bars:
    ...     bars("latency")(1, 2)
    """

    def __init__(self, show: bool) -> None:
        self.show = show
        self._bars: list[Any] = []

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for bar in self._bars:
            bar.close()

    def __call__(self, stage: str) -> Callable[[int, int], None]:
        """A callback (done, total) for one stage."""
        bar: Any = None

        def update(done: int, total: int) -> None:
            nonlocal bar
            if not self.show:
                return
            if bar is None:
                bar = tqdm(total=total, desc=f"{stage:<10}", leave=True)
                self._bars.append(bar)
            bar.total = total
            bar.update(done - bar.n)
            if done >= total:  # its line is free for the next stage
                self._bars.remove(bar)
                bar.close()
                bar = None

        return update
