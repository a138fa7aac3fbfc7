r"""Least squares through an activation: what a ReLU cuts off need not be met.

    min over W   of   sum over positions p of |f(W z_p) - f(y_p)|^2,       z = (patch, 1),  f pointwise

by majorisation (Hunter, Lange 2004), each round a least-squares problem with the Gram matrix of the first: with q = W z the
value so far, the target of the next round is

    t = q - slope * (f(q) - f(y)),      slope = max(f'(q), (f(q) - f(y)) / (q - y)), held to 0..1

For ReLU that is y where y > 0 and q >= 0, min(q, 0) where y <= 0, and between the two where y > 0 > q. A round that makes the sum
larger is not taken, so the result is never worse, on the data, than what it starts from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxmerge.algebra.affine import Affine
from fxmerge.algebra.least_squares import Factored, patches
from fxmerge.core.geometry import Geometry

Activation = Callable[[Tensor], Tensor]


@dataclass
class Rows:
    """What a convolution of one geometry reads at some positions, and what it should give there.

    Args:
        geometry: of the convolution.
        memory_bytes: bound on what is held.
    """

    geometry: Geometry
    memory_bytes: int
    read: list[Tensor] = field(default_factory=list)
    wanted: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    held: int = 0
    full: bool = False

    def add(self, x: Tensor, y: Tensor, positions: Tensor | None, shares: Tensor | None = None) -> bool:
        """Add a batch: inputs (N, C_in, *size), targets (N, C_out, *outputs).

        What it reads, wants and counts is then the last in ``read``, (groups, rows, m + 1), ``wanted``, (rows, C_out), and
        ``counts``, (rows,). Where it is too much it is False, from there on, and nothing is held.

        Args:
            x, y: inputs and targets.
            positions: (rows,) indices into the N * outputs positions, images first; None for all.
            shares: (N,), how much each image counts; None for 1.
        """
        if self.full:
            return False
        z = patches(x, self.geometry, positions)
        flat = y.movedim(1, -1).flatten(0, -2)
        self.read.append(torch.cat((z, z.new_ones(*z.shape[:2], 1)), 2))
        self.wanted.append(flat if positions is None else flat[positions])
        each = x.new_ones(len(x)) if shares is None else shares.to(x)
        every = each.repeat_interleave(len(flat) // len(x))
        self.counts.append(every if positions is None else every[positions])
        self.held += self.read[-1].nbytes + 4 * self.wanted[-1].nbytes
        if 2 * self.held <= self.memory_bytes:  # they are joined once
            return True
        self.full = True
        self.read.clear()
        self.wanted.clear()
        self.counts.clear()
        return False

    def fitted(self, factored: Factored, start: Affine, activation: Activation, *, rounds: int) -> Affine:
        """The best convolution, as seen behind the activation, from ``start`` on.

        Args:
            factored: the Gram matrix of these rows, of this geometry.
            start: their plain solution.
            activation: pointwise on (rows, C_out).
            rounds: at most so many.
        """
        z, y, counts = torch.cat(self.read, 1), torch.cat(self.wanted), torch.cat(self.counts)[:, None]
        with torch.no_grad():
            reached = activation(y)
        best, loss, now = start, math.inf, start
        for _ in range(rounds + 1):
            value = self._value(now, z)
            seen, slope = _seen_and_slope(activation, value, y, reached)
            found = float(((seen - reached).double().square() * counts).sum())
            if not found < loss * (1 - 1e-4):
                break
            best, loss = now, found
            target = value - slope * (seen - reached)
            now = factored.affine(self._products(z, counts * target))
        return best

    def _value(self, affine: Affine, z: Tensor) -> Tensor:
        """(rows, C_out)."""
        groups = self.geometry.groups
        weight = affine.weight.reshape(groups, -1, z.shape[2] - 1).mT
        bias = affine.bias.reshape(groups, 1, -1)
        return (z @ torch.cat((weight, bias), 1).to(z)).transpose(0, 1).flatten(1)

    def _products(self, z: Tensor, target: Tensor) -> Tensor:
        """z t^T, float64, (groups, m + 1, C_out/groups)."""
        grouped = target.unflatten(1, (self.geometry.groups, -1)).transpose(0, 1)
        products: Tensor = z.mT @ grouped
        return products.double()


def _seen_and_slope(activation: Activation, value: Tensor, y: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
    """f(q), and the slope of the majorising parabola."""
    with torch.enable_grad():
        at = value.detach().clone().requires_grad_()
        seen = activation(at)
        (derivative,) = torch.autograd.grad(seen.sum(), at)
    seen = seen.detach()
    apart = value - y
    secant = torch.where(apart.abs() > 1e-12, (seen - reached) / torch.where(apart == 0, 1.0, apart), derivative)
    return seen, torch.maximum(derivative, secant).clamp(0, 1)
