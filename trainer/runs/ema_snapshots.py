"""Saved power-function averages of a stage, and averages of any length made from them.

RUN/STAGE/ema/step-00001000-began-0-updates-998.safetensors, beside the folder of the checkpoints. float16, as in EDM2.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.storage.shards import Store
from trainer.runs.checkpoint import Checkpoint, copy_file, write_tensors
from trainer.runs.power_ema import combination

_NAME = re.compile(r"step-(\d+)-began-(\d+)-updates-(\d+)\.safetensors")
# An average whose window differs more from the wanted one is refused. With 16 snapshots of 0.05 and 0.10 the error is
# 4% at 0.03, below 1% from 0.04 to 0.15, 2% at 0.20 and 8% at 0.25. The weights differ by more than the window where
# a long one reaches back to the first steps, which change them most: by 25% of the distance at 0.25 in the test.
_LARGEST_ERROR = 0.05


@dataclass(frozen=True)
class Snapshots:
    """The snapshots beside one folder of checkpoints. Only one process may save at a time."""

    checkpoints: str  # a local path or s3://bucket/prefix

    @property
    def _store(self) -> Store:
        return Store(f"{self.checkpoints.rstrip('/').rpartition('/')[0]}/ema")

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes the state of a `PowerEMA` after `step` steps. Removes those of this and later steps.

        Later ones are there after a rollback, or if newer checkpoints were lost.
        """
        name = f"step-{step:08d}-began-{int(tensors['began'])}-updates-{int(tensors['updates'])}.safetensors"
        averages = {name: tensor for name, tensor in tensors.items() if "/" in name}
        self._remove_from(step)
        with self._store.committed(name) as path:
            write_tensors(path, averages)

    def add_from(self, source: "Snapshots", last_step: int, stamps: dict[str, str]) -> None:
        """Copies the snapshots of `source` up to `last_step` that are not here, each read back and compared. Like
        `save`, each removes those of the same and later steps.

        `stamps`: of the files of `source` that were copied, by name, so that one that was written again after a
        rollback is copied again; updated. A file that is not listed is here if its name and size are.
        """
        originals, copies = source._store.files(), self._store.files()
        for name, step, _, _ in source.found():
            if step > last_step:
                break
            original = originals[name]
            is_known = stamps.setdefault(name, original.stamp) == original.stamp
            if not (is_known and name in copies and copies[name].size == original.size):
                self._remove_from(step)
                with self._store.committed(name) as path:
                    copy_file(source._store, name, path)
                stamps[name], copies = original.stamp, self._store.files()

    def _remove_from(self, step: int) -> None:
        for other, found_step, _, _ in self.found():
            if found_step >= step:
                self._store.remove(other)

    def found(self) -> list[tuple[str, int, int, int]]:
        """(file name, step, began, updates) of each, by step."""
        matches = [match for name in self._store.files() if (match := _NAME.fullmatch(name))]
        return sorted(((m[0], int(m[1]), int(m[2]), int(m[3])) for m in matches), key=lambda item: item[1])

    def read(self, name: str) -> dict[str, Tensor]:
        with self._store.local_copy(name) as path:
            tensors: dict[str, Tensor] = load_file(path)
        return tensors


def averages_of_length(checkpoint: Checkpoint, length: float) -> tuple[dict[str, Tensor], float]:
    """Averages at a checkpoint as if tracked with this length, by parameter, float32; and the error of `combination`.

    ValueError if the run kept no averages, or if they do not give this length to 5%.
    """
    if "power_ema.safetensors" not in checkpoint.state()["files"]:
        raise ValueError(f"{checkpoint.folder} has no averages of other lengths: they need --set ema_snapshots above 0")
    state = checkpoint.tensors("power_ema")
    snapshots = Snapshots(checkpoint.folder.rpartition("/")[0])
    usable = [
        (name, updates)
        for name, step, began, updates in snapshots.found()
        if step < checkpoint.step and began == int(state["began"]) and 0 < updates < int(state["updates"])
    ]

    def sources() -> Iterator[dict[str, Tensor]]:
        yield state
        yield from (snapshots.read(name) for name, _ in usable)

    lengths = sorted({float(name.partition("/")[0]) for name in state if "/" in name})
    updates = [max(1, int(state["updates"])), *(updates for _, updates in usable)]
    factors, error = combination([(each, count) for count in updates for each in lengths], length)
    if error > _LARGEST_ERROR:
        raise ValueError(
            f"an EMA length of {length:g} differs by {error:.0%} from what the {len(usable)} snapshots of "
            f"{checkpoint.folder} can give; choose one nearer to {' or '.join(f'{each:g}' for each in lengths)}"
        )
    rows = iter(factors.reshape(len(updates), len(lengths)))
    total: dict[str, Tensor] = {}
    for tensors, row in zip(sources(), rows, strict=True):
        for each, factor in zip(lengths, row, strict=True):
            for name, tensor in tensors.items():
                kind, slash, parameter = name.partition("/")
                if slash and float(kind) == each:
                    zero = torch.zeros_like(tensor, dtype=torch.float32)
                    total[parameter] = total.get(parameter, zero).add_(tensor.float(), alpha=float(factor))
    return total, error
