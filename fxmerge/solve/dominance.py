"""Points that no other point beats, in two and in three dimensions; vectorised, exact.

In three, p beats q if it is nowhere larger. With the points in lexicographic order, only an earlier one can beat a later one
(or equal it). So, as in merge sort (Kung, Luccio, Preparata 1975): halve the order; q in the later half is beaten by the earlier
half if the smallest third coordinate among the points there whose second is no larger than q's is no larger than q's. All
halvings of one depth are done at once: sort by (block, second coordinate), and take running minima that start anew in each
block, because the values of each block lie below those of the block before. O(n log^2 n).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]


def unbeaten_of_two(first: Ints, second: Ints) -> Ints:
    """Indices by rising ``first`` and falling ``second``; of equal ``first`` the earliest that stays."""
    order = np.argsort(first, kind="stable")  # timsort: fast on parts that are sorted already
    least = np.minimum.accumulate(second[order])
    unbeaten: Ints = order[np.append(True, least[1:] < least[:-1])]
    return unbeaten


def unbeaten_of_three(first: Ints, second: Ints, third: Ints, tie: Ints) -> Ints:
    """Indices in lexicographic order; of points equal in all three the one of smallest ``tie``, then the earliest."""
    order = np.lexsort((tie, third, second, first))
    second, third = _ranks(second[order]), _ranks(third[order])
    beaten = np.zeros(len(order), dtype=np.bool_)
    place = np.argsort(second, kind="stable")  # equal ones stay in lexicographic order, the earlier first
    span = len(order) + 1
    narrow = np.uint16 if len(order) <= 1 << 17 else np.int64  # which numpy sorts by radix
    for depth in range((len(order) - 1).bit_length()):
        # A block of this depth is two halves of 2**depth points.
        blocks = (place >> (depth + 1)).astype(narrow)
        grouped = place[np.argsort(blocks, kind="stable")]
        earlier = (grouped >> depth) & 1 == 0
        floor = -(grouped >> (depth + 1)) * (span + 1)
        least = np.minimum.accumulate(np.where(earlier, third[grouped], span) + floor)
        later = ~earlier
        beaten[grouped[later]] |= least[later] <= (third[grouped] + floor)[later]
    return order[~beaten]


def _ranks(values: Ints) -> Ints:
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
