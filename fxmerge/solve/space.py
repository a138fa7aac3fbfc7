"""Restrictions of what is offered; they give the published baselines.

- ``joint``: everything.
- ``activations``: only what removes activations and prunes no convolution: the candidates *composed* of all layers of their
  segment. This is depth compression by two-stage dynamic programming (Kim, Jeong, Lee, Song; ICML 2023, arXiv 2301.12187). Its
  first stage looks for the fastest way to merge a stretch whose activations are gone in several pieces; here a stretch without
  activations is one convolution, and pieces are candidates of their own, which keep the activations between them.
- ``layers``: a knapsack over convolutions: only *identities* in place of one layer, of which no activation is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from fxmerge.core.region import Unit
from fxmerge.core.segment import Candidate
from fxmerge.errors import InputError
from fxmerge.solve import given
from fxmerge.solve.layers import Places, breadth_first

SpaceName: TypeAlias = Literal["joint", "activations", "layers"]


def restrict(root: Unit, candidates: Sequence[Candidate], space: SpaceName) -> tuple[Candidate, ...]:
    """The candidates of a space, in the order given.

    Args:
        root: the whole network.
        candidates: of that network.
        space: see the module's text.

    Raises:
        InputError: there is no such space, a candidate fits no chain, or something is of another kind.
    """
    root, candidates = given.a_unit(root), given.some_candidates(candidates)
    if space == "joint":
        return candidates
    if space == "activations":
        return tuple(c for c in candidates if c.kind == "composed" and not c.removed)
    if space == "layers":
        places = Places(breadth_first(root))
        alone = (c for c in candidates if c.kind == "identity" and not c.activations and not c.norms)
        return tuple(c for c in alone if places.covered(c) == 1)
    raise InputError(f"space is {space!r}; give one of {', '.join(get_args(SpaceName))}.")
