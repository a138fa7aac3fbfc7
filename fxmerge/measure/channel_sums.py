r"""What stands for a norm that depends on its input: the scale and shift of every channel that come nearest to it on data.

    min over a, b of   sum over images and positions of (a x + b - y)^2,     a = cov(x, y) / var(x),   b = mean(y) - a mean(x)

channel by channel, with x what the norm reads and y what it gives; or, behind a merged convolution, x what the moved norm gives
and y what the original computes there. The sums add up over batches, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.algebra.affine import Affine, scaling


@dataclass
class ChannelSums:
    """Sums over data that decide a scale and a shift for every channel.

    Args:
        sums: float64, (5, C): of 1, x, y, x*x and x*y; None before anything was added.
        dims: spatial dimensions.
    """

    sums: Tensor | None = None
    dims: int = 2

    def add(self, x: Tensor, y: Tensor, shares: Tensor | None = None) -> None:
        """Add a batch: two tensors (N, C, *space) of one shape, and how much each image counts, (N,)."""
        self.dims = x.dim() - 2
        x, y = (value.detach().double().flatten(2) for value in (x, y))
        share = x.new_ones(()) if shares is None else shares.double().view(-1, 1, 1)
        rows = torch.stack([(value * share).sum((0, 2)) for value in (torch.ones_like(x), x, y, x * x, x * y)])
        self.sums = rows if self.sums is None else self.sums + rows

    def solve(self) -> Affine:
        """The best scale and shift; where x does not vary, none of it is used."""
        assert self.sums is not None, "no data was added"
        count, x, y, xx, xy = self.sums
        mean_x, mean_y = x / count, y / count
        variance = xx / count - mean_x**2
        varies = variance > 1e-12 * (xx / count)
        scale = torch.where(varies, (xy / count - mean_x * mean_y) / torch.where(varies, variance, 1.0), 0.0)
        return scaling(scale, mean_y - scale * mean_x, self.dims)
