"""What a candidate takes of a network's capacity: convolutions and weights that training will not have.

A plan that is nearest to the original untrained is not the one that trains best. Of nine plans of ResNet-20 on CIFAR-10, three
epochs each, top-1 after training went with top-1 before by a correlation of 0.7 only, and was within 0.13 points of

    88.02 - 0.19 * (convolutions lost) - 0.030 * (per cent of weights lost),

which is about as much for a share of all 19 convolutions as for an equal share of all weights. It does not hold by itself: the plan
that it asks for at 1.6x makes eight 3x3 convolutions 1x1 and ends 2.4 points below; with the loss of the candidates beside it, see
``benchmarks/results/cifar10_resnet20.md``.
"""

from __future__ import annotations

import math

from fxmerge.analysis.segments import Findings
from fxmerge.core.segment import Candidate, Segment
from fxmerge.operators import Map


class Capacity:
    """Shares of the convolutions and of the weights in them."""

    def __init__(self, findings: Findings) -> None:
        verdicts = {node.name: verdict for node, verdict in findings.verdicts.items()}
        maps = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, Map) and verdict.role == "convolution"}
        self._weights = {name: math.prod(found.geometry.weight_shape) for name, found in maps.items()}
        self._all = max(1, sum(self._weights.values()))

    def lost(self, segment: Segment, candidate: Candidate) -> float:
        """The share of all convolutions that a candidate takes, and that of all weights, added up: from 0 to 2.

        A kernel of more weights than it replaces gives nothing back; a merge that is exact takes nothing.
        """
        if candidate.exact:
            return 0.0
        replaced = [self._weights[name] for name in segment.convolutions if name in self._weights]
        stays = candidate.kind != "identity"
        weights = math.prod(candidate.geometry.weight_shape) if stays else 0
        convolutions = max(0, len(replaced) - stays)
        return convolutions / max(1, len(self._weights)) + max(0, sum(replaced) - weights) / self._all
