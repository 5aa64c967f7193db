"""Which rows of a selection are trained on, which are held out, and which row groups hold their pictures.

Axes: G row groups with selected rows, ordered by (shard, row group); R selected rows; H held-out rows.
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

_THREADS = 32  # each shard's footer is one wait for S3

ROW_INDEX_FILE = "layout.safetensors"
_FORMAT = 1  # increase when the meaning of the stored arrays changes
_ARRAYS = ("shard_G", "group_G", "first_G", "stop_G", "counts_G", "group_H", "row_H")


@dataclass(frozen=True)
class Selection:
    """The shards of a selection, their numbers of rows, and the folder their pictures are read from."""

    dataset: str  # absolute path or s3:// prefix, because workers run in other folders
    name: str
    shards: tuple[str, ...]
    counts: tuple[int, ...]
    digest: str  # hash in selection.json, which the training records
    images: str = "images"  # folder of the pictures: images or a tier of smaller ones

    @property
    def count(self) -> int:
        return sum(self.counts)

    @classmethod
    def load(cls, dataset: str, name: str, resolution: int | None = None) -> "Selection":
        """Reads selection.json. FileNotFoundError if it does not exist, UsageError if it is damaged.

        Pictures come from the smallest tier whose short side is at least `resolution` pixels and that has all of the
        selection's shards.
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
class RowIndex:
    """Maps sample numbers to rows. Sample i is training row i - (samples of earlier row groups) of its row group.

    Stores a few numbers per row group (1 MB for 8 million rows), so it can be sent to every process that reads.
    """

    selection: Selection
    hold_out: float  # share of ids
    shard_G: Indices  # index in selection.shards
    group_G: Indices  # row group number in the shard's file of pictures
    first_G: Indices  # first row of the row group in that file
    stop_G: Indices  # row after its last one
    counts_G: Indices  # samples: selected rows that are not held out; may be 0
    group_H: Indices  # index into G of each held-out row; sorted by the hash of their ids
    row_H: Indices  # index among the selected rows of that row group

    @classmethod
    def build(cls, selection: Selection, hold_out: float = 0.0) -> "RowIndex":
        """Reads the footers of the pictures and two columns of the selection.

        UsageError if no row is left to train on, ValueError if the selection was made from other pictures.
        """
        if not 0 <= hold_out < 1:
            raise UsageError(f"hold_out {hold_out} is the share of pictures not trained on: at least 0 and below 1")
        with ThreadPoolExecutor(_THREADS) as threads:
            parts = list(threads.map(lambda shard: _index_shard(selection, shard, hold_out), selection.shards))
        groups = [len(part["counts_G"]) for part in parts]
        before = np.cumsum(groups) - groups
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if not joined["counts_G"].sum():
            raise UsageError(
                f"hold_out {hold_out} leaves none of the {selection.count} pictures of {selection.name} to train on; "
                "set a smaller one"
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
    def load_or_build(cls, folder: str, selection: Selection, hold_out: float = 0.0) -> "RowIndex":
        """Cached `build`. The file in `folder` is used as long as a listing shows that its source files are the same,
        which saves opening two files per shard."""
        provenance = _provenance(selection, hold_out)
        with suppress(OSError, SafetensorError), safe_open(Path(folder) / ROW_INDEX_FILE, "np") as file:
            if file.metadata() == {"made_from": provenance}:
                return cls(selection, hold_out, **{name: file.get_tensor(name) for name in _ARRAYS})
        index = cls.build(selection, hold_out)
        arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in _ARRAYS}
        with suppress(OSError):  # with a full disk it is rebuilt at the next start
            Store(folder).write(ROW_INDEX_FILE, safetensors.numpy.save(arrays, {"made_from": provenance}))
        return index

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.counts_G.sum())

    @property
    def held_out_count(self) -> int:
        return len(self.group_H)

    def locate(self, samples: Indices) -> tuple[Indices, Indices]:
        """The row group of each sample, and its index among that row group's training rows."""
        end_G = np.cumsum(self.counts_G)
        group = np.searchsorted(end_G, samples, side="right")
        return group, samples - (end_G - self.counts_G)[group]


def _provenance(selection: Selection, hold_out: float) -> str:
    """Hash of everything the index depends on: the selection's hash, and the pictures' files as listed."""
    listed = Store(selection.dataset).listing(selection.images)
    pictures = [(shard, listed[f"{shard}.parquet"].stamp) for shard in selection.shards if f"{shard}.parquet" in listed]
    source = [_FORMAT, selection.dataset, selection.name, selection.digest, selection.images, hold_out, pictures]
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()


def _index_shard(selection: Selection, shard: str, hold_out: float) -> dict[str, Indices]:
    """RowIndex's arrays for one shard, with `group_H` counted within it, and hash_H, the hashes of the held-out ids."""
    store = Store(selection.dataset)
    rows = store.read_table(f"selections/{selection.name}/{shard}.parquet", ["id", "row"])
    with store.open(f"{selection.images}/{shard}.parquet") as file:
        footer = pq.read_metadata(file)
    counts = np.array([footer.row_group(group).num_rows for group in range(footer.num_row_groups)], np.int64)
    end = np.cumsum(counts)
    row_R, hash_R = rows["row"].to_numpy().astype(np.int64), id_hash(rows["id"])
    if len(row_R) and row_R.max() >= footer.num_rows:
        raise stale_selection(selection, shard)
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


def stale_selection(selection: Selection, shard: str) -> ValueError:
    return ValueError(
        f"{selection.images}/{shard}.parquet of {selection.dataset} has other rows than the selection "
        f"{selection.name!r}: it was ingested again since; run pipeline/caption.py and pipeline/curate.py again"
    )


def held_out(hash_R: Indices, share: float) -> NDArray[np.bool_]:
    """True for held-out ids. Depends on the hashes only, so every stage and selection holds out the same pictures, and
    a smaller share holds out a subset of a larger one."""
    held: NDArray[np.bool_] = (hash_R.view(np.uint64) >> np.uint64(11)) * 2.0**-53 < share
    return held


def id_hash(ids: pa.Array | pa.ChunkedArray) -> Indices:
    """A 64-bit hash of each string, equal on every machine: the xor of the hashes of its 8-byte words."""
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
