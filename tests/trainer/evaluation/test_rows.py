"""Which rows of a selection are evaluated, and their pictures."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.pictures.crops import Crop, square_crop
from pipeline.storage.shards import Store
from trainer.evaluation.rows import center_crops, evaluation_rows
from trainer.samples.row_index import Selection, held_out, id_hash


@pytest.fixture(scope="module")
def selection(dataset: Path) -> Selection:
    return Selection.load(str(dataset), "demo", 64)


def test_held_out_rows_come_first_and_each_row_once(selection: Selection) -> None:
    rows = evaluation_rows(selection, 10**6, hold_out=0.1)
    assert len({row.id for row in rows}) == len(rows) == selection.count
    marked = [row.held_out for row in rows]
    assert 0 < sum(marked) < len(rows)
    assert marked == sorted(marked, reverse=True)
    assert marked == held_out(id_hash(pa.array([row.id for row in rows])), 0.1).tolist()
    assert evaluation_rows(selection, 5, hold_out=0.1) == rows[:5]
    assert not any(row.held_out for row in evaluation_rows(selection, 5, hold_out=0.0))


def test_center_crops_are_those_of_each_rows_own_picture(selection: Selection) -> None:
    rows = evaluation_rows(selection, 12, hold_out=0.0)
    crops = {row.id: pixels for row, pixels in center_crops(selection, rows, 32)}
    assert crops.keys() == {row.id for row in rows}
    store = Store(selection.dataset)
    for shard in selection.shards:
        for picture in store.read_table(f"images/{shard}.parquet", ["id", "image"]).to_pylist():
            if picture["id"] in crops:
                crop = square_crop(picture["image"], 32, 0.5, 0.5)
                assert isinstance(crop, Crop)
                assert np.array_equal(crops[picture["id"]], crop.pixels_HWC)
