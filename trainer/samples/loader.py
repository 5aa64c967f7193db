"""The loader actor. A file without Ray Train, transformers and torch: every actor process imports it.

Its import takes 0.3 s of a core and 75 MB instead of 3.7 s and 395 MB.
"""

import os
from collections.abc import Sequence

from trainer.samples.data import Batch, TrainingData, held_out_batch, load_batch


class Loader:
    """Reads the samples of some streams, on any node.

    With `low_priority`, for training on the same CPUs, it runs at niceness 19: a training thread that waits for a
    decoder delays all others, while a loader is a few batches ahead. (SCHED_IDLE starves beside a busy process.)
    """

    def __init__(self, data: TrainingData, low_priority: bool) -> None:
        self.data = data
        if low_priority:
            os.nice(19)

    def load(self, positions: range) -> Batch:
        return load_batch(self.data, positions)

    def held_out(self, numbers: Sequence[int]) -> Batch:
        return held_out_batch(self.data, numbers)
