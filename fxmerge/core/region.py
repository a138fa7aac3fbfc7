"""The shape of a network as the solver sees it: a tree of chains.

A *chain* is a sequence of cuts (tensors every path through the chain crosses) with a *unit* between each two. A unit is one layer
with its norm and activation, or a whole residual or multi-branch block; then it has children, one chain for each stretch inside
that is a chain again (its branches; in a block that is no series-parallel graph, the chains inside). A merge covers a run of
units of one chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fxmerge.errors import PlanError


@dataclass(frozen=True, slots=True)
class Unit:
    """What lies between two neighbouring cuts.

    Args:
        end: the cut it ends at (a node name); names the unit, and is unique in the tree.
        nodes: its own nodes in graph order, those of its children not counted.
        children: the chains inside.
    """

    end: str
    nodes: tuple[str, ...]
    children: tuple[Chain, ...] = ()

    def all_nodes(self) -> Iterator[str]:
        """Its own nodes, then those of its children; not in graph order."""
        yield from self.nodes
        for child in self.children:
            for unit in child.units:
                yield from unit.all_nodes()

    def walk(self) -> Iterator[Unit]:
        """This unit and all below it."""
        yield self
        for child in self.children:
            for unit in child.units:
                yield from unit.walk()

    def to_json(self) -> dict[str, Any]:
        """A value that ``json`` can write and :meth:`from_json` reads back."""
        chains = [{"cuts": list(chain.cuts), "units": [unit.to_json() for unit in chain.units]} for chain in self.children]
        return {"end": self.end, "nodes": list(self.nodes), "children": chains}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Unit:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: it is not such a value.
        """
        try:
            chains = [
                Chain(_names(chain["cuts"]), tuple(cls.from_json(unit) for unit in chain["units"])) for chain in data["children"]
            ]
            return cls(_names([data["end"]])[0], _names(data["nodes"]), tuple(chains))
        except (KeyError, TypeError, ValueError, RecursionError) as fault:
            if isinstance(fault, PlanError):
                raise
            raise PlanError(f"not a region: {fault!r}") from fault


@dataclass(frozen=True, slots=True)
class Chain:
    """Units one after the other; ``cuts[i]`` enters ``units[i]``, which ends at ``cuts[i + 1]``."""

    cuts: tuple[str, ...]
    units: tuple[Unit, ...]

    def __post_init__(self) -> None:
        if len(self.cuts) != len(self.units) + 1:
            raise ValueError(f"{len(self.units)} units need {len(self.units) + 1} cuts, found {len(self.cuts)}")


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"expected a list of names, found {values!r:.80}")
    return tuple(values)
