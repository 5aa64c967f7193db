"""What a training's loader actors do.

In a file of its own, as each of their processes imports the file of its class: without Ray Train, transformers and
torch that takes 0.3 seconds of a core instead of 3.7, and 75 MB instead of 395.
"""

import os
from collections.abc import Sequence

from trainer.samples.data import Batch, TrainingData, held_out_batch, load_batch


class Loader:
    """Reads the samples of some streams, on any node.

    gives_way: where the training computes on the same CPUs. A thread of it that is put off by a decoder holds up all
    the others, and the loader always has a few batches' time. (Never SCHED_IDLE: beside a busy process it starves.)
    """

    def __init__(self, data: TrainingData, gives_way: bool) -> None:
        self.data = data
        if gives_way:
            os.nice(19)

    def load(self, positions: range) -> Batch:
        return load_batch(self.data, positions)

    def held_out(self, numbers: Sequence[int]) -> Batch:
        return held_out_batch(self.data, numbers)
