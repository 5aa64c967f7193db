"""Batches of a small drawn dataset: each row group read once an epoch, held-out pictures, broken rows, tiers, mirroring.

The pictures are drawn, ingested, captioned and curated by the pipeline's own functions, in this process.
"""

import io
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import curate, validation
from pipeline.captioning import ImageShard, caption_shard
from pipeline.curation import quality_table, read_inputs
from pipeline.images import square_crop
from pipeline.jobs import JobFailed, UsageError
from pipeline.preflight import plan_shards
from pipeline.sample_data import draw_shard
from pipeline.sample_posts import plan, shards
from pipeline.selection import Curation
from pipeline.shards import Store
from pipeline.stage_rules import Rules, tag_rules, with_artists
from pipeline.validation import IngestRules, downsize_shard, validate_shard
from trainer.captions import CaptionConfig, TextParts, full_text
from trainer.data import CropConfig, TrainingData, held_out_batch, join, load_batch
from trainer.data import _NOT_TO_MIRROR as NOT_TO_MIRROR
from trainer.data import _row_groups as row_groups_of_this_process
from trainer.order import micro_batches
from trainer.samples import Layout, Selection, held_out, id_hash

CROP = CropConfig(resolution=48, captions=CaptionConfig(), seed=5)
BATCH = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two shards in row groups of about three pictures, a tier of 96 and one of 512 pixels, two selections."""
    folder = tmp_path_factory.mktemp("data")
    raw, store, rules = Store(str(folder / "raw")), Store(str(folder / "dataset")), IngestRules(downsize=96)
    for name, posts in shards(plan(0, 320)):
        draw_shard(raw, name, 0, posts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_GROUP_BYTES", 24_000)
        made = plan_shards([raw.path(f"{site}/0000.parquet") for site in ("danbooru", "pixiv")], "auto", None, store, rules)
        for name, shard in made.shards.items():
            validate_shard(shard, store.root, rules)
            downsize_shard(shard, store.root, replace(rules, downsize=512))
            caption_shard(ImageShard(name, store.rows(f"images/{name}.parquet"), ""), store.root, "captions")
    _curate(store, "all", Rules(min_side=64))
    _curate(store, "danbooru", Rules(min_side=64, sources=("danbooru",)))
    return store


def _curate(store: Store, name: str, rules: Rules) -> None:
    def one_by_one(work: Callable[[Any], None], parts: dict[str, Any], description: str) -> dict[str, str]:
        for part in parts.values():
            work(part)
        return {}

    rules = with_artists(rules)
    inputs = read_inputs(store, rules)
    quality, _ = quality_table(store, f"selections/{name}", inputs, rules.preset, renew=False)
    curation = Curation(store.root, name, rules, tag_rules(rules), quality)
    curate.curate(curation, inputs, one_by_one, {})


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    row_groups_of_this_process().forget()


def load(store: Store, crop: CropConfig = CROP, name: str = "all", **more: Any) -> TrainingData:
    selection = Selection.load(store.root, name, more.pop("resolution", None))
    return TrainingData.load(selection, crop, batch_size=BATCH, **{"streams": 4, "window": 2} | more)


def selected_ids(store: Store, name: str = "all") -> list[str]:
    folder = f"selections/{name}"
    tables = [store.read_table(f"{folder}/{shard}.parquet", ["id"]) for shard in store.shards(folder)]
    return [row for table in tables for row in table["id"].to_pylist()]


def test_x(dataset: Store) -> None:
    data = load(dataset)
    print(data.layout.count, len(data.layout.counts_G), data.layout.counts_G)
    print(pq.read_metadata(dataset.path("images/danbooru-0000.parquet")).num_row_groups, dataset.shards("images"))
    b = load_batch(data, range(8))
    print(b.ids, b.texts, b.frame_B4)
    print(held_out_batch(load(dataset, hold_out=.1), range(4)))
