"""Rows of a selection to evaluate on: their texts, and the center crops of their pictures.

Rows are ordered by the hash of their ids, a shuffle that is the same on every machine. Held-out rows come first,
because they are those with the lowest hashes (`row_index.held_out`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.pictures.crops import Crop, square_crop
from pipeline.storage.shards import Store
from trainer.samples.data import text_parts
from trainer.samples.row_groups import read_row_group, selection_rows
from trainer.samples.row_index import RowIndex, Selection, held_out, id_hash
from trainer.samples.training_text import full_text


@dataclass(frozen=True)
class EvaluationRow:
    id: str
    text: str  # full training text
    general: tuple[str, ...]  # general tags
    held_out: bool


def evaluation_rows(selection: Selection, count: int, hold_out: float) -> list[EvaluationRow]:
    """The first `count` rows, or all if there are fewer. hold_out: share of the ids that the run was not trained on."""
    store = Store(selection.dataset)
    ids = [store.read_table(f"selections/{selection.name}/{name}.parquet", ["id"])["id"] for name in selection.shards]
    shard_R = np.repeat(np.arange(len(ids)), [len(shard) for shard in ids])
    row_R = np.concatenate([np.arange(len(shard)) for shard in ids])
    hash_R = np.concatenate([id_hash(shard) for shard in ids])
    first = np.argsort(hash_R.view(np.uint64), kind="stable")[:count]
    held_R = held_out(hash_R, hold_out)
    rows: dict[int, EvaluationRow] = {}
    for shard in np.unique(shard_R[first]).tolist():
        of_shard = first[shard_R[first] == shard]
        table = selection_rows(selection.dataset, selection.name, selection.shards[shard])
        for number, row in zip(of_shard.tolist(), table.take(pa.array(row_R[of_shard])).to_pylist(), strict=True):
            text = full_text(text_parts(row))
            rows[number] = EvaluationRow(row["id"], text, tuple(row["general"]), bool(held_R[number]))
    return [rows[number] for number in first.tolist()]


def center_crops(
    selection: Selection, rows: Sequence[EvaluationRow], side: int
) -> Iterator[tuple[EvaluationRow, NDArray[np.uint8]]]:
    """The center square (side, side, 3) of each row's picture, in file order; unreadable pictures are left out."""
    wanted = {row.id: row for row in rows}
    index = RowIndex.build(selection)
    for group in range(len(index.counts_G)):
        found = read_row_group(index, group) if _has_any(index, group, wanted) else None
        if found is None or found.pictures is None:
            continue
        for at, row in enumerate(found.rows):
            if (name := row["id"]) in wanted:
                crop = square_crop(found.pictures[at].as_py(), side, 0.5, 0.5)
                if isinstance(crop, Crop):
                    yield wanted[name], crop.pixels_HWC


def _has_any(index: RowIndex, group: int, wanted: dict[str, EvaluationRow]) -> bool:
    """True if the row group has a wanted row. Reads no pictures."""
    rows = selection_rows(index.selection.dataset, index.selection.name, index.selection.shards[index.shard_G[group]])
    row_R = rows["row"].to_numpy()
    inside = (row_R >= index.first_G[group]) & (row_R < index.stop_G[group])
    return any(name in wanted for name in rows["id"].filter(pa.array(inside)).to_pylist())
