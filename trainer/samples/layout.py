"""Which rows of a selection are trained on, which are held out, and in which row groups of pictures they lie.

Axes: G row groups that have selected rows, in the order (shard, row group); R selected rows; H held-out rows.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pipeline.core.errors import UsageError
from pipeline.storage.shards import Store
from trainer.diffusion.keyed_random import sample_key

Indices = NDArray[np.int64]

# Of the layout: on S3 each footer is a wait of its own.
_THREADS = 32

KEPT = "layout.safetensors"
_FORMAT = 1  # of a layout that is kept: one more with each change of what it says
_ARRAYS = ("shard_G", "group_G", "first_G", "stop_G", "counts_G", "group_H", "row_H")


@dataclass(frozen=True)
class Selection:
    """The shards of a selection, how many rows each has, and where their pictures are read."""

    dataset: str  # absolute: workers run in folders of their own
    name: str
    shards: tuple[str, ...]
    counts: tuple[int, ...]
    digest: str  # selection.json's hash: training records it
    images: str = "images"  # folder of the pictures: images, or a smaller tier of them

    @property
    def count(self) -> int:
        return sum(self.counts)

    @classmethod
    def load(cls, dataset: str, name: str, resolution: int | None = None) -> "Selection":
        """FileNotFoundError where the dataset has no such selection, UsageError where its record is damaged.

        `resolution`: of the crops, in pixels. The pictures are read from the smallest tier that has at least so many
        along the short side and has all of the selection's shards.
        """
        store = Store(dataset)
        file = f"selections/{name}/selection.json"
        try:
            record = json.loads(store.read(file))
            counts, digest = dict(sorted(record["shards"].items())), str(record["hash"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{store.path(file)} is damaged; run pipeline/curate.py again") from error
        images = "images" if resolution is None else _tier(store, tuple(counts), resolution)
        return cls(store.root, name, tuple(counts), tuple(counts.values()), digest, images)


def _tier(store: Store, shards: Sequence[str], resolution: int) -> str:
    sides = sorted(int(found[1]) for name in store.folders("") if (found := re.fullmatch(r"images-([1-9]\d*)", name)))
    fitting = (f"images-{side}" for side in sides if side >= resolution)
    return next((folder for folder in fitting if set(shards) <= set(store.shards(folder))), "images")


@dataclass(frozen=True, eq=False)
class Layout:
    """Sample i is training row i - (samples of the row groups before) of its row group.

    A few numbers for each row group: 1 MB for 8 million rows, computed once and sent to every process that reads.
    """

    selection: Selection
    hold_out: float  # share of ids
    shard_G: Indices  # index in selection.shards
    group_G: Indices  # in that shard's file of pictures
    first_G: Indices  # row of that file with which it begins
    stop_G: Indices  # and before which it ends
    counts_G: Indices  # samples: selected rows that are not held out; may be 0
    group_H: Indices  # of each held-out row; these are in the order of their ids' hashes, see `held_out`
    row_H: Indices  # which of the selected rows of its row group

    @classmethod
    def of(cls, selection: Selection, hold_out: float = 0.0) -> "Layout":
        """From the footers of the pictures and two columns of the selection. UsageError where nothing is left to train
        on; ValueError where the selection was made from other pictures."""
        if not 0 <= hold_out < 1:
            raise UsageError(f"hold_out {hold_out} is the share of pictures not trained on: from 0 to below 1")
        with ThreadPoolExecutor(_THREADS) as threads:
            parts = list(threads.map(lambda shard: _shard_layout(selection, shard, hold_out), selection.shards))
        groups = [len(part["counts_G"]) for part in parts]
        before = np.cumsum(groups) - groups
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if not joined["counts_G"].sum():
            raise UsageError(
                f"hold_out {hold_out} leaves none of the {selection.count} pictures of {selection.name} to train on; "
                "give a smaller one"
            )
        by_hash = np.argsort(joined.pop("hash_H").view(np.uint64), kind="stable")
        group_H = joined["group_H"] + np.repeat(before, [len(part["group_H"]) for part in parts])
        return cls(
            selection,
            hold_out,
            np.repeat(np.arange(len(parts)), groups),
            **joined | {"group_H": group_H[by_hash], "row_H": joined["row_H"][by_hash]},
        )

    @classmethod
    def kept_in(cls, folder: str, selection: Selection, hold_out: float = 0.0) -> "Layout":
        """`of`, kept as folder/layout.safetensors and taken from there while no file that it was made from is another
        one: a listing instead of two files to open for each shard."""
        made_from = _made_from(selection, hold_out)
        kept = Path(folder) / KEPT
        with suppress(OSError, SafetensorError), safe_open(kept, "np") as file:
            if file.metadata() == {"made_from": made_from}:
                return cls(selection, hold_out, **{name: file.get_tensor(name) for name in _ARRAYS})
        layout = cls.of(selection, hold_out)
        arrays = {name: np.ascontiguousarray(getattr(layout, name)) for name in _ARRAYS}
        with suppress(OSError):  # a full disk: it is computed again next time
            Store(folder).write(KEPT, safetensors.numpy.save(arrays, {"made_from": made_from}))
        return layout

    @property
    def count(self) -> int:
        """Samples."""
        return int(self.counts_G.sum())

    @property
    def held_out_count(self) -> int:
        return len(self.group_H)

    def locate(self, samples: Indices) -> tuple[Indices, Indices]:
        """The row group of each sample, and which of its training rows it is."""
        end_G = np.cumsum(self.counts_G)
        group = np.searchsorted(end_G, samples, side="right")
        return group, samples - (end_G - self.counts_G)[group]


def _made_from(selection: Selection, hold_out: float) -> str:
    """A hash of all that decides a layout: the selection by its own hash, the pictures by how a listing shows them."""
    listed = Store(selection.dataset).listing(selection.images)
    pictures = [(shard, listed[f"{shard}.parquet"].stamp) for shard in selection.shards if f"{shard}.parquet" in listed]
    source = [_FORMAT, selection.dataset, selection.name, selection.digest, selection.images, hold_out, pictures]
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()


def _shard_layout(selection: Selection, shard: str, hold_out: float) -> dict[str, Indices]:
    """The fields of Layout for one shard, `group_H` counted within it; and the hashes of the held-out ids, hash_H."""
    store = Store(selection.dataset)
    rows = store.read_table(f"selections/{selection.name}/{shard}.parquet", ["id", "row"])
    with store.open(f"{selection.images}/{shard}.parquet") as file:
        footer = pq.read_metadata(file)
    counts = np.array([footer.row_group(group).num_rows for group in range(footer.num_row_groups)], np.int64)
    end = np.cumsum(counts)
    row_R, hash_R = rows["row"].to_numpy().astype(np.int64), id_hash(rows["id"])
    if len(row_R) and row_R.max() >= footer.num_rows:
        raise stale(selection, shard)
    group_R = np.searchsorted(end, row_R, side="right")
    held_R = held_out(hash_R, hold_out)
    selected = np.bincount(group_R, minlength=len(counts))
    used = np.flatnonzero(selected)
    within_R = np.empty_like(group_R)
    within_R[np.argsort(group_R, kind="stable")] = np.arange(len(group_R)) - np.repeat(
        np.cumsum(selected) - selected, selected
    )
    return {
        "group_G": used,
        "first_G": (end - counts)[used],
        "stop_G": end[used],
        "counts_G": np.bincount(group_R[~held_R], minlength=len(counts))[used],
        "group_H": np.searchsorted(used, group_R[held_R]),
        "row_H": within_R[held_R],
        "hash_H": hash_R[held_R],
    }


def stale(selection: Selection, shard: str) -> ValueError:
    return ValueError(
        f"{selection.images}/{shard}.parquet of {selection.dataset} has other rows than the selection "
        f"{selection.name!r}, ingested again since; run pipeline/caption.py and pipeline/curate.py again"
    )


def held_out(hash_R: Indices, share: float) -> NDArray[np.bool_]:
    """Which ids are held out. By their hashes alone: the same pictures in every stage and every selection, and those
    of a smaller share are among those of a larger one."""
    held: NDArray[np.bool_] = (hash_R.view(np.uint64) >> np.uint64(11)) * 2.0**-53 < share
    return held


def id_hash(ids: pa.Array | pa.ChunkedArray) -> Indices:
    """64 bits of each text, the same on every machine: the exclusive or of the hashes of its words of 8 bytes."""
    array = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    assert array.type == pa.string(), array.type
    _, offsets, values = array.buffers()
    end_R = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    length_R = np.diff(end_R)
    words = -(-int(length_R.max(initial=0)) // 8)
    bytes_RL: NDArray[Any] = np.zeros((len(array), 8 * words), np.uint8)
    if words:
        bytes_RL[np.arange(8 * words) < length_R[:, None]] = np.frombuffer(values, np.uint8)[end_R[0] : end_R[-1]]
    hash_R = np.zeros(len(array), np.int64)
    for word in range(words):
        hashed_R = sample_key(0, word, bytes_RL.view("<i8")[:, word])
        hash_R ^= np.where(length_R > 8 * word, hashed_R, 0)
    return hash_R
