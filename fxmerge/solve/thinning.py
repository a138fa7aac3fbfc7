"""Of a front too long, the points to keep, and what those that are dropped may cost; why that adds up is said in ``frontier``."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fxmerge.solve.dominance import Ints, unbeaten_of_three


def thinned(loss: Ints, max_points: int) -> tuple[Ints, int]:
    """Of a front too long, the points to keep, and how much worse than a dropped one its stand-in is at most.

    The range of losses is cut into equal buckets, as narrow as the number allows; the fastest of each bucket stands in
    for the rest of it. The point of least loss stays as well.
    """
    depth = loss[0] - loss

    def opens(width: int) -> npt.NDArray[np.bool_]:
        bucket = depth // width
        return np.append(True, bucket[1:] > bucket[:-1])

    narrow, wide = 0, int(depth[-1]) // (max_points - 1) + 1  # so wide, there are max_points - 1 at most
    while wide - narrow > max(1, wide >> 4):
        width = (narrow + wide) // 2
        narrow, wide = (narrow, width) if np.count_nonzero(opens(width)) < max_points else (width, wide)
    kept = opens(wide)
    stand_in = np.maximum.accumulate(np.where(kept, np.arange(len(loss)), 0))
    kept[-1] = True
    return np.flatnonzero(kept), int((loss[stand_in] - loss)[~kept].max())


def thinned_in_three(latency: Ints, loss: Ints, amount: Ints, tie: Ints, max_points: int) -> tuple[Ints, int, int]:
    """Of a front too long, the points to keep, and how much worse, and how much more, a stand-in is at most.

    Losses and amounts are taken for those of their buckets, as many of each as leave few enough points that no other beats.
    """
    depth, above = loss - loss.min(), amount - amount.min()
    ends = np.unique([int(np.argmin(loss)), int(np.argmin(amount)), 0])

    def stay(buckets: int) -> tuple[Ints, int, int]:
        wide, tall = int(depth.max()) // buckets + 1, int(above.max()) // buckets + 1
        kept = unbeaten_of_three(latency, above // tall, depth // wide, tie)
        return np.union1d(kept, ends), wide - 1, tall - 1

    few = max(1, math.isqrt(max_points - len(ends)))  # so few, there are no more cells than points allowed
    best = stay(few)
    step = few
    while step > few >> 2:
        tried = stay(few + step)
        if len(tried[0]) <= max_points:
            best, few, step = tried, few + step, 2 * step
        else:
            step //= 2
    return best
