"""The ImageNet benchmark for several processes; latencies are counted, losses made up."""

from __future__ import annotations

import torch

from benchmarks import imagenet
from benchmarks.made_up import MadeUp
from tests.fakes import PriceTimer

if __name__ == "__main__":
    torch.set_num_threads(1)
    imagenet.TIMER, imagenet.SCORER = PriceTimer(), MadeUp()
    imagenet.main()
