r"""Weights from data: the convolution that best maps one tensor to another.

    min over W, b of   sum over positions p of |W patch_p + b - y_p|^2  +  lambda |W - W0|^2

by its normal equations. With z = (patch, 1) the sums  G = sum z z^T  and  C = sum z y^T  are all that is needed of the data; they
add up over batches, in float64, and those of a smaller kernel are a sub-matrix of those of a larger one. What is constant over
space, a time embedding that is added inside, is one more part of z, with a matrix of its own. With groups, every group has
equations of its own. lambda is relative to the mean of G's diagonal, and does not touch the bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fxmerge.algebra.affine import Affine
from fxmerge.core.geometry import Axis, Geometry, in_pad_order


def covering(geometries: Sequence[Geometry]) -> Geometry:
    """The smallest geometry whose taps include those of all given, which share channels, groups, stride and up."""
    first = geometries[0]
    axes = tuple(_covering_axis([g.axes[i] for g in geometries]) for i in range(len(first.axes)))
    return Geometry(first.in_channels, first.out_channels, axes, first.groups, True)


def _covering_axis(axes: Sequence[Axis]) -> Axis:
    cover = axes[0]
    for axis in axes[1:]:
        cover = cover.plus(axis)
    return cover


def patches(x: Tensor, geometry: Geometry, positions: Tensor | None = None) -> Tensor:
    """What a convolution of this geometry reads at each output position.

    Args:
        x: (N, C_in, *size).
        geometry: of the convolution; ``out_channels`` does not matter.
        positions: (rows,) indices into the N * outputs positions, images first; None for all.

    Returns:
        (groups, rows, C_in/groups * taps), the columns in the order of a flattened weight.
    """
    spread = _spread(x, geometry.up)
    pads = ((-axis.offset, axis.excess + axis.offset + axis.extent) for axis in geometry.axes)
    windows = F.pad(spread, in_pad_order(tuple(pads)))
    for dim, axis in enumerate(geometry.axes):
        windows = windows.unfold(2 + dim, axis.extent, axis.stride)[..., :: axis.dilation]
    dims = len(geometry.axes)
    # (N, *outputs, C, *taps)
    windows = windows.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    lead = windows.shape[: 1 + dims]
    index = torch.arange(lead.numel(), device=x.device) if positions is None else positions
    rows = windows[torch.unravel_index(index, lead)]
    return rows.reshape(len(index), geometry.groups, -1).transpose(0, 1)


def _spread(x: Tensor, up: Sequence[int]) -> Tensor:
    """The image with zeros behind every pixel, so many positions for each."""
    if all(factor == 1 for factor in up):
        return x
    spread = x.new_zeros(*x.shape[:2], *(size * factor for size, factor in zip(x.shape[2:], up, strict=True)))
    pixels: tuple[slice, ...] = (slice(None), slice(None), *(slice(None, None, factor) for factor in up))
    spread[pixels] = x
    return spread


#: Rows of patches are worked on in pieces of about this size.
_CHUNK_BYTES = 256 << 20
#: Columns of a block of a Gram matrix that are multiplied at once.
_BLOCK = 512


@dataclass
class NormalEquations:
    """Sums over data that decide the weights of every convolution within one covering geometry.

    Args:
        geometry: covers all convolutions to be solved for; its groups are theirs.
        gram: float64, (groups, m + e + 1, m + e + 1) with m = C_in/groups * taps.
        targets: by name, float64, (groups, m + e + 1, C_out/groups).
        rows: positions summed so far.
        extra: e, how many numbers constant over space every image has besides.
    """

    geometry: Geometry
    gram: Tensor
    targets: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    extra: int = 0

    @classmethod
    def empty(cls, geometry: Geometry, device: torch.device | None = None, *, extra: int = 0) -> NormalEquations:
        size = unknowns(geometry) + extra
        return cls(geometry, torch.zeros(geometry.groups, size, size, dtype=torch.float64, device=device), extra=extra)

    def add(
        self,
        x: Tensor,
        targets: dict[str, Tensor],
        positions: Tensor | None = None,
        *,
        sides: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            x: (N, C_in, *size).
            targets: for every name (N, C_out, *outputs).
            positions: (rows,) indices into the N * outputs positions, images first; None for all.
            sides: (N, extra), what is constant over space.
            shares: (N,), how much each image counts; None for 1.
        """
        flats = {name: y.movedim(1, -1).flatten(0, -2) for name, y in targets.items()}
        there = x.shape[0] * math.prod(self.geometry.outputs(x.shape[2:]))
        index = torch.arange(there, device=x.device) if positions is None else positions
        for at in index.split(self._chunk):
            z = patches(x, self.geometry, at).double()
            images = torch.div(at, there // x.shape[0], rounding_mode="floor")
            if sides is not None:
                z = torch.cat((z, sides.double()[images].expand(len(z), -1, -1)), 2)
            z = torch.cat((z, z.new_ones(*z.shape[:2], 1)), 2)
            self._add(z, {name: flat[at] for name, flat in flats.items()}, None if shares is None else shares[images])

    def add_rows(self, z: Tensor, targets: dict[str, Tensor], counts: Tensor | None = None) -> None:
        """Add what somebody else has read already.

        Args:
            z: (groups, rows, m + e + 1), the patches with a one behind each.
            targets: for every name (rows, C_out).
            counts: (rows,), how much each counts; None for 1.
        """
        for first in range(0, z.shape[1], self._chunk):
            part = slice(first, first + self._chunk)
            self._add(z[:, part].double(), {name: y[part] for name, y in targets.items()}, None if counts is None else counts[part])

    @property
    def _chunk(self) -> int:
        """Rows that are worked on at once."""
        return max(1, _CHUNK_BYTES // (8 * len(self.gram) * self.gram.shape[1]))

    def _add(self, z: Tensor, targets: dict[str, Tensor], counts: Tensor | None) -> None:
        weighted = z if counts is None else z * counts.double().view(1, -1, 1)
        _add_symmetric(self.gram, weighted, z)
        self.rows += z.shape[1]
        for name, y in targets.items():
            grouped = y.double().reshape(len(y), self.geometry.groups, -1).transpose(0, 1)
            product = weighted.mT @ grouped
            self.targets[name] = self.targets[name] + product if name in self.targets else product

    def solve(self, name: str, geometry: Geometry, *, ridge: float = 1e-4, prior: Affine | None = None) -> Affine:
        """The best convolution of a geometry within the covering one, for one target.

        Args:
            name: of the target.
            geometry: taps within the covering geometry's, the same groups.
            ridge: lambda, relative to the mean of the Gram matrix's diagonal.
            prior: W0, of the same geometry; None for zero.
        """
        return self.solve_with_sides(name, geometry, ridge=ridge, prior=prior)[0]

    def solve_with_sides(
        self, name: str, geometry: Geometry, *, ridge: float = 1e-4, prior: Affine | None = None
    ) -> tuple[Affine, Tensor]:
        """:meth:`solve`, and the matrix (C_out, extra) that the numbers constant over space go through."""
        return self.factored(geometry, ridge=ridge).parts(self.targets[name], prior)

    def factored(self, geometry: Geometry, *, ridge: float = 1e-4) -> Factored:
        """The damped Gram matrix of a geometry within the covering one, ready for any number of right-hand sides."""
        keep = self._columns(geometry)
        damped = self.gram[:, keep[:, None], keep]
        weights = len(keep) - 1 - self.extra
        diagonal = damped.diagonal(dim1=1, dim2=2)
        tiny = torch.finfo(torch.float64).tiny
        strength = ridge * diagonal[:, :weights].mean(1).clamp_min(tiny)
        diagonal[:, :weights] += strength[:, None]
        if self.extra:
            diagonal[:, weights:-1] += ridge * diagonal[:, weights:-1].mean(1).clamp_min(tiny)[:, None]
        # A bias alone keeps its column: where no data came, the damping above is all there is.
        factor, failed = torch.linalg.cholesky_ex(damped)
        return Factored(geometry, keep, weights, strength, damped if failed.any() else None, factor)

    def error(self, name: str, affine: Affine) -> float:
        """The sum of squared errors of a map of the covering geometry, without the part that no map can change.

        sum |W z - y|^2 - sum |y|^2 = tr(W G W^T) - 2 tr(W C)
        """
        assert affine.geometry.weight_shape == self.geometry.weight_shape
        assert not self.extra
        groups = self.geometry.groups
        bias = affine.bias.reshape(groups, 1, -1)
        w = torch.cat((affine.weight.reshape(groups, bias.shape[2], -1).mT, bias), 1).to(self.gram)
        return float((w * (self.gram @ w - 2 * self.targets[name])).sum())

    def plus(self, other: NormalEquations) -> NormalEquations:
        """Those of both data sets together."""
        assert self.geometry == other.geometry
        targets = {name: sums + other.targets[name] for name, sums in self.targets.items()}
        return NormalEquations(self.geometry, self.gram + other.gram, targets, self.rows + other.rows, self.extra)

    def _columns(self, geometry: Geometry) -> Tensor:
        """Columns of the covering patch that a smaller kernel reads, those of what is constant over space, and the bias's."""
        cover = self.geometry
        index = torch.arange(unknowns(cover) - 1, device=self.gram.device).reshape(-1, *cover.kernel)
        for dim, (inner, outer) in enumerate(zip(geometry.axes, cover.axes, strict=True)):
            first = (inner.offset - outer.offset) // outer.dilation
            step = inner.dilation // outer.dilation if inner.taps > 1 else 1
            places = torch.arange(first, first + step * (inner.taps - 1) + 1, step, device=index.device)
            index = index.index_select(1 + dim, places)
        first = unknowns(cover) - 1
        return torch.cat((index.flatten(), torch.arange(first, first + self.extra + 1, device=index.device)))


@dataclass(frozen=True, eq=False)
class Factored:
    """A damped Gram matrix, factored.

    Args:
        geometry: of the convolution.
        keep: the columns of the covering patch that it reads.
        weights: how many of them have weights.
        strength: lambda of every group, (groups,).
        singular: the matrix itself, where it has no Cholesky factor.
        factor: the Cholesky factor, (groups, columns, columns).
    """

    geometry: Geometry
    keep: Tensor
    weights: int
    strength: Tensor
    singular: Tensor | None
    factor: Tensor

    def solution(self, right: Tensor, prior: Affine | None = None) -> Tensor:
        """(groups, columns, C_out/groups), for z y^T of the covering patch."""
        right = right[:, self.keep]
        if prior is not None:
            w0 = prior.weight.reshape(self.geometry.groups, -1, self.weights).mT.to(right)
            right[:, : self.weights] += self.strength[:, None, None] * w0
        if self.singular is not None:
            solution: Tensor = torch.linalg.lstsq(self.singular, right).solution
            return solution
        return torch.cholesky_solve(right, self.factor)

    def affine(self, right: Tensor, prior: Affine | None = None) -> Affine:
        """:meth:`solution` as a map; there are no numbers constant over space."""
        return _affine(self.geometry, self.solution(right, prior), self.weights)

    def parts(self, right: Tensor, prior: Affine | None = None) -> tuple[Affine, Tensor]:
        """:meth:`solution` as a map, and the matrix (C_out, extra) that the numbers constant over space go through."""
        solution = self.solution(right, prior)
        extra = solution.shape[1] - 1 - self.weights
        matrix = solution[:, self.weights : -1].mT.reshape(self.geometry.out_channels, extra)
        return _affine(self.geometry, solution, self.weights), matrix


def _add_symmetric(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right, which is symmetric: of wide matrices only the blocks on and right of the diagonal are multiplied."""
    size = total.shape[-1]
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        product = left[..., start:stop].mT @ right[..., start:]
        total[..., start:stop, start:] += product
        total[..., stop:, start:stop] += product[..., stop - start :].mT


def _affine(geometry: Geometry, solution: Tensor, weights: int) -> Affine:
    weight = solution[:, :weights].mT.reshape(geometry.weight_shape)
    return Affine(geometry, weight, solution[:, -1].reshape(-1))


def unknowns(geometry: Geometry) -> int:
    """Weights that one output channel has, and its bias."""
    total = geometry.in_channels // geometry.groups
    for taps in geometry.kernel:
        total *= taps
    return total + 1
