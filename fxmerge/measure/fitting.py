"""Weights of single candidates: the normal equations of all that start at one tensor come from one pass over the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from fxmerge.algebra.affine import Affine, pointwise
from fxmerge.algebra.least_squares import Factored, NormalEquations, covering, unknowns
from fxmerge.algebra.through import Rows
from fxmerge.core.geometry import Geometry
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.errors import CalibrationError
from fxmerge.graph.meta import facts
from fxmerge.measure.calibration import images_in, shared_out
from fxmerge.measure.channel_sums import ChannelSums
from fxmerge.measure.refit import Pair
from fxmerge.measure.substitution import Limits, Substitution
from fxmerge.operators import Activation, Site

#: Candidates that share normal equations: one entry, one stride, one factor of upsampling, one output size, one number of groups,
#: the same side inputs.
_Key: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int, tuple[str, ...]]


class FitOptions(Limits, Protocol):
    """What decides weights; see :class:`fxmerge.Reconstruction`."""

    @property
    def ridge(self) -> float: ...

    @property
    def rows_per_unknown(self) -> int: ...

    @property
    def least_rows(self) -> int: ...

    @property
    def fit_images(self) -> int | None: ...

    @property
    def through(self) -> int: ...

    @property
    def seed(self) -> int: ...


@dataclass
class Fitting(Substitution):
    """Weights for candidates of one network, from one calibration set."""

    options: FitOptions
    starved: list[tuple[float, Candidate]] = field(init=False, default_factory=list)
    worst_starved: float = field(init=False, default=1.0)

    def weights(self, proposals: Sequence[Proposal]) -> dict[str, Affine]:
        """Weights for every candidate that has any, and for the parts of it."""
        self.fix_norms([name for p in proposals for c in p.candidates for name in c.fixed])
        fitted = [c for p in proposals for c in p.candidates if c.kind == "fitted"]
        equations = self._equations(fitted, self._twice())
        self.starved += [(unknowns(c.geometry) / max(1, equations[_key(c)].rows), c) for c in fitted]
        maps: dict[str, Affine] = {}
        for (key, geometry), members in _alike(fitted).items():
            factored = equations[key].factored(geometry, ridge=self.options.ridge)
            for candidate in members:
                maps.update(self._solved(equations[key], candidate, factored))
        maps.update(self._moved([c for c in fitted if c.moved], maps, self._twice()))
        for proposal in proposals:
            maps.update({c.id: self.composed(proposal.segment, c) for c in proposal.candidates if c.kind == "composed"})
        return maps

    def warn_if_starved(self) -> None:
        """Warn where a filter has more weights than the data has positions: it can fit them by heart."""
        ratio, worst = max(self.starved, key=lambda entry: entry[0], default=(0.0, None))
        self.starved.clear()
        if worst is not None and ratio > self.worst_starved and self.options.fit_images is None:
            self.worst_starved = ratio
            images = sum(map(images_in, self.batches))
            warnings.warn(
                f"{images} calibration images are too few: {worst.id} has {ratio:.1f} times as many weights a filter as they have "
                f"positions, so its weights fit these by heart. Give at least {math.ceil(images * ratio)}, better ten times that",
                stacklevel=3,
            )

    def _twice(self) -> Iterator[Pair]:
        """The values of the original, batch by batch, as those of a student too that does not differ yet."""
        for batch in self.batches:
            with torch.inference_mode():
                values = self.original(batch)
            yield Pair(values, values, self.shares(batch))

    def _equations(
        self, fitted: Sequence[Candidate], pairs: Iterable[Pair], rows: Rows | None = None
    ) -> dict[_Key, NormalEquations]:
        """Normal equations for these candidates, from the student's values to the original's.

        Args:
            fitted: the candidates.
            pairs: values of both.
            rows: gathers what the only candidate, without side inputs, reads, for a second look.
        """
        shared: dict[_Key, list[Candidate]] = {}
        for candidate in fitted:
            shared.setdefault(_key(candidate), []).append(candidate)
        equations = {
            key: NormalEquations.empty(
                covering([c.geometry for c in members]), self.like.device, extra=self._numbers_of_sides(members[0])
            )
            for key, members in shared.items()
        }
        generator = torch.Generator().manual_seed(self.options.seed)
        for original, student, shares in pairs if fitted else ():
            with torch.inference_mode():
                for key, members in shared.items():
                    x = self.image(key[0], student)
                    targets = {c.exit: self.image(c.exit, original) for c in members}
                    for name, value in ((key[0], x), *targets.items()):
                        _require_finite(name, value)
                    positions = self.positions(equations[key].geometry, x, next(iter(targets.values())), generator)
                    each = shared_out(shares, x, len(x))
                    if rows is not None and rows.add(x, targets[members[0].exit], positions, each):
                        counts = None if each is None else rows.counts[-1]
                        equations[key].add_rows(rows.read[-1], {members[0].exit: rows.wanted[-1]}, counts)
                    else:
                        sides = self._sides(members[0], student, len(x))
                        equations[key].add(x, targets, positions, sides=sides, shares=each)
        return equations

    def positions(self, geometry: Geometry, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor | None:
        there = x.shape[0] * math.prod(y.shape[2:])
        wanted = max(self.options.least_rows, self.options.rows_per_unknown * unknowns(geometry))
        share = math.ceil(wanted * x.shape[0] / sum(map(images_in, self.batches)))
        if share >= there:
            return None
        return torch.randperm(there, generator=generator)[:share].to(x.device)

    def _sides(self, candidate: Candidate, values: Mapping[Node, Any], images: int) -> Tensor | None:
        """The numbers of a fitted candidate's side inputs, (images, numbers), as the network has them."""
        found = [values[self.replay.named[name]].flatten(1).expand(images, -1) for name in candidate.sides]
        return torch.cat(found, 1) if found else None

    def _numbers_of_sides(self, candidate: Candidate) -> int:
        return sum(math.prod((facts(self.replay.named[name]).shape or ())[1:]) for name in candidate.sides)

    def _solved(self, equations: NormalEquations, candidate: Candidate, factored: Factored) -> dict[str, Affine]:
        """The convolution of a fitted candidate, and the matrix of each of its side inputs."""
        ready = replace(factored, geometry=candidate.geometry)
        affine, matrix = ready.parts(equations.targets[candidate.exit])
        sizes = [math.prod((facts(self.replay.named[name]).shape or ())[1:]) for name in candidate.sides]
        parts = zip(candidate.sides, matrix.split(sizes, 1) if sizes else (), strict=True)
        dims = len(candidate.geometry.axes)
        return {candidate.id: affine, **{candidate.part(name): pointwise(part, dims) for name, part in parts}}

    def _moved(self, moved: Sequence[Candidate], maps: Mapping[str, Affine], pairs: Iterable[Pair]) -> dict[str, Affine]:
        """The scale and shift of the norm behind the convolution of each of these candidates, whose weights are known."""
        sums = {c.id: ChannelSums() for c in moved}
        for original, student, shares in pairs if moved else ():
            with torch.inference_mode():
                for candidate in moved:
                    names, compute = self._on_images(candidate, maps)
                    found = compute(self.image(candidate.entry, student), *(student[self.replay.named[n]] for n in names[1:]))
                    sums[candidate.id].add(found, self.image(candidate.exit, original), shared_out(shares, found, len(found)))
        return {c.part(c.moved): sums[c.id].solve() for c in moved}

    def refit(self, merge: Candidate, pairs: Sequence[Pair]) -> dict[str, Affine]:
        """Weights for one merge, and for its parts, from the student's own values to the original's."""
        if merge.kind == "composed":
            self.fix_norms(merge.fixed)
            return {merge.part(name): self.fixed[name] for name in merge.fixed}
        if merge.kind == "identity":
            return {}
        activation = self._behind(merge) if self.options.through and not merge.sides and not merge.moved else None
        if activation is None:
            equations = self._equations([merge], pairs)[_key(merge)]
            maps = self._solved(equations, merge, equations.factored(merge.geometry, ridge=self.options.ridge))
            return {**maps, **(self._moved([merge], maps, pairs) if merge.moved else {})}
        rows = Rows(merge.geometry, self.options.memory_bytes // 4)
        equations = self._equations([merge], pairs, rows)[_key(merge)]
        factored = equations.factored(merge.geometry, ridge=self.options.ridge)
        affine = factored.affine(equations.targets[merge.exit])
        if not rows.full:
            with torch.inference_mode(False):
                affine = rows.fitted(factored, affine, activation, rounds=self.options.through)
        return {merge.id: affine}

    def _behind(self, merge: Candidate) -> Callable[[Tensor], Tensor] | None:
        """The activation that is put behind the exit, or that all its readers apply, if they do."""
        if merge.added:
            return self.applied(merge.added)
        exit_node = self.replay.named[merge.exit]
        readers = list(exit_node.users)
        verdicts = [self.findings.operators.verdict(Site(self.folded, node)) for node in readers]
        kinds = {verdict.name for verdict in verdicts if isinstance(verdict, Activation)}
        if len(kinds) != 1 or not all(isinstance(v, Activation) for v in verdicts) or readers[0].all_input_nodes != [exit_node]:
            return None
        return self.applied(readers[0].name)


def _key(candidate: Candidate) -> _Key:
    geometry = candidate.geometry
    excess = tuple(axis.excess for axis in geometry.axes)
    return candidate.entry, geometry.stride, geometry.up, excess, geometry.groups, candidate.sides


def _alike(fitted: Sequence[Candidate]) -> dict[tuple[_Key, Geometry], list[Candidate]]:
    """Candidates that one factor of their normal equations solves for: those that differ in their exits alone."""
    found: dict[tuple[_Key, Geometry], list[Candidate]] = {}
    for candidate in fitted:
        found.setdefault((_key(candidate), replace(candidate.geometry, out_channels=candidate.geometry.groups)), []).append(
            candidate
        )
    return found


def held_bytes(candidate: Candidate) -> int:
    """What the normal equations of a candidate take: the Gram matrix, its factor, and the weights that are solved for."""
    if candidate.kind != "fitted":
        return 0
    m = unknowns(candidate.geometry)
    return 3 * 8 * candidate.geometry.groups * m * m


def grouped(proposals: Sequence[Proposal], memory_bytes: int, at_least: int) -> list[list[Proposal]]:
    """Proposals in their order, in groups within a memory limit and of about the same number of candidates."""
    most = math.ceil(sum(len(p.candidates) for p in proposals) / max(1, at_least))
    groups: list[list[Proposal]] = []
    held: dict[_Key, int] = {}
    for proposal in proposals:
        own = {_key(c): 0 for c in proposal.candidates if c.kind == "fitted"}
        for candidate in proposal.candidates:
            if candidate.kind == "fitted":
                own[_key(candidate)] = max(own[_key(candidate)], held_bytes(candidate))
        both = {key: max(held.get(key, 0), own.get(key, 0)) for key in {**held, **own}}
        full = groups and sum(len(p.candidates) for p in groups[-1]) >= most
        apart = groups and groups[-1][-1].segment.entry != proposal.segment.entry
        if not groups or sum(both.values()) > memory_bytes or (full and apart):
            groups.append([])
            both = own
        groups[-1].append(proposal)
        held = both
    return groups


def _require_finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise CalibrationError(f"the network gives NaN or infinity at {name} on the calibration inputs; check their preprocessing")
