"""How many layers a stretch of a network holds; a layer is a unit with no unit inside it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fxmerge.core.region import Chain, Unit
from fxmerge.core.segment import Candidate
from fxmerge.errors import InputError


def breadth_first(root: Unit) -> list[Unit]:
    """All units, each before those inside it; without recursion, so of any depth."""
    units = [root]
    for unit in units:
        units.extend(inner for chain in unit.children for inner in chain.units)
    return units


class Places:
    """Where candidates lie in a tree of chains, and what they cover."""

    def __init__(self, units: Sequence[Unit]) -> None:
        """
        Args:
            units: of the whole tree, as :func:`breadth_first` gives them.
        """
        self._chains = [chain for unit in units for chain in unit.children]
        self._chain_of = {unit.end: index for index, chain in enumerate(self._chains) for unit in chain.units}
        self._cuts = [{cut: k for k, cut in enumerate(chain.cuts)} for chain in self._chains]
        self.layers: dict[str, int] = {}  # by the end of a unit: how many it holds, itself if no other
        self.ends_of_layers: set[str] = set()
        for unit in reversed(units):
            inside = sum(self.layers[inner.end] for chain in unit.children for inner in chain.units)
            self.layers[unit.end] = inside or 1
            if not inside:
                self.ends_of_layers.add(unit.end)
        self._before = [self._running(chain) for chain in self._chains]

    def _running(self, chain: Chain) -> list[int]:
        return list(itertools.accumulate((self.layers[unit.end] for unit in chain.units), initial=0))

    def stretch(self, candidate: Candidate) -> tuple[int, int, int]:
        """The chain a candidate lies in, by number, and the numbers of its first and last cut.

        Raises:
            InputError: it lies in none.
        """
        chain = self._chain_of.get(candidate.end, -1)
        cuts = self._cuts[chain] if chain >= 0 else {}
        if candidate.entry not in cuts or cuts[candidate.entry] >= cuts[candidate.end]:
            where = f"{candidate.entry!r} to {candidate.end!r}"
            raise InputError(f"candidate {candidate.id!r}: no chain runs from {where}. Offer candidates of this network only.")
        return chain, cuts[candidate.entry], cuts[candidate.end]

    def covered(self, candidate: Candidate) -> int:
        """How many layers a candidate replaces."""
        chain, start, stop = self.stretch(candidate)
        return self._before[chain][stop] - self._before[chain][start]
