"""The rows of a selection that a model is examined on: their texts, and the middles of their pictures.

In the order of their ids' hashes, which is a shuffle that is the same everywhere; held-out rows come first, because
they are those of the lowest hashes (`layout.held_out`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.pictures.decoder import Crop, square_crop
from pipeline.storage.shards import Store
from trainer.samples.data import text_parts
from trainer.samples.layout import Layout, Selection, held_out, id_hash
from trainer.samples.row_groups import read_row_group, selection_rows
from trainer.samples.training_text import full_text


@dataclass(frozen=True)
class ExaminedRow:
    id: str
    text: str  # whole
    general: tuple[str, ...]  # tags
    held_out: bool  # from the training


def examined_rows(selection: Selection, count: int, hold_out: float) -> list[ExaminedRow]:
    """The first `count` rows, or all where there are fewer; hold_out: the run's share of ids not trained on."""
    store = Store(selection.dataset)
    ids = [store.read_table(f"selections/{selection.name}/{name}.parquet", ["id"])["id"] for name in selection.shards]
    shard_R = np.repeat(np.arange(len(ids)), [len(shard) for shard in ids])
    row_R = np.concatenate([np.arange(len(shard)) for shard in ids])
    hash_R = np.concatenate([id_hash(shard) for shard in ids])
    first = np.argsort(hash_R.view(np.uint64), kind="stable")[:count]
    held_R = held_out(hash_R, hold_out)
    rows: dict[int, ExaminedRow] = {}
    for shard in np.unique(shard_R[first]).tolist():
        of_shard = first[shard_R[first] == shard]
        table = selection_rows(selection.dataset, selection.name, selection.shards[shard])
        for number, row in zip(of_shard.tolist(), table.take(pa.array(row_R[of_shard])).to_pylist(), strict=True):
            rows[number] = ExaminedRow(
                row["id"], full_text(text_parts(row)), tuple(row["general"]), bool(held_R[number])
            )
    return [rows[number] for number in first.tolist()]


def middle_crops(
    selection: Selection, rows: Sequence[ExaminedRow], side: int
) -> Iterator[tuple[ExaminedRow, NDArray[np.uint8]]]:
    """The middle square of each row's picture, (side, side, 3), row group by row group, each of which is read once;
    pictures that cannot be read are left out."""
    wanted = {row.id: row for row in rows}
    layout = Layout.of(selection)
    for group in range(len(layout.counts_G)):
        found = read_row_group(layout, group) if _has_any(layout, group, wanted) else None
        if found is None or found.pictures is None:
            continue
        for at, row in enumerate(found.rows):
            if (name := row["id"]) in wanted:
                cut = square_crop(found.pictures[at].as_py(), side, 0.5, 0.5)
                if isinstance(cut, Crop):
                    yield wanted[name], cut.pixels_HWC


def _has_any(layout: Layout, group: int, wanted: dict[str, ExaminedRow]) -> bool:
    """Without reading a picture."""
    selection, shard = layout.selection, layout.selection.shards[layout.shard_G[group]]
    rows = selection_rows(selection.dataset, selection.name, shard)
    row_R = rows["row"].to_numpy()
    inside = (row_R >= layout.first_G[group]) & (row_R < layout.stop_G[group])
    return any(name in wanted for name in rows["id"].filter(pa.array(inside)).to_pylist())
