"""Batches of a small drawn dataset: reads, held-out rows, replacements, tiers and mirroring.

The dataset is drawn, ingested, captioned and curated by the pipeline's functions in this process.
"""

import errno
import io
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import curate
from pipeline.captions.tag_captions import ImageShard, caption_shard
from pipeline.core.errors import JobFailed, StorageUnavailable, UsageError
from pipeline.core.records import IMAGES
from pipeline.curation.execution import InThisProcess
from pipeline.curation.plan import read_inputs
from pipeline.curation.selection import Curation
from pipeline.curation.stage_rules import Rules, tag_rules, with_lists
from pipeline.curation.survey import quality_table
from pipeline.drawings.sample_posts import plan, shards
from pipeline.ingestion import commit
from pipeline.ingestion.commit import ingest_shard
from pipeline.ingestion.preflight import plan_shards
from pipeline.ingestion.rules import IngestRules
from pipeline.ingestion.smaller_tier import downsize_shard
from pipeline.pictures.crops import Crop, square_crop
from pipeline.sample_data import draw_shard
from pipeline.storage.manifest import Catalog
from pipeline.storage.shards import Store
from trainer.diffusion.keyed_random import Stream, keyed_uniform
from trainer.samples import row_groups
from trainer.samples.data import _ROW_GROUPS as ROW_GROUPS
from trainer.samples.data import (
    Batch,
    CropConfig,
    TrainingData,
    can_mirror,
    concatenate,
    example_texts,
    held_out_batch,
    load_batch,
    mirrored,
    text_parts,
)
from trainer.samples.order import micro_batches
from trainer.samples.row_groups import lost_row_group
from trainer.samples.row_index import _ARRAYS, ROW_INDEX_FILE, RowIndex, Selection, held_out, id_hash
from trainer.samples.training_text import CaptionConfig, TextParts, full_text

CROP = CropConfig(resolution=48, captions=CaptionConfig(), seed=5)
BATCH = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two shards with row groups of about three pictures, tiers of 96 and 512 pixels, and two selections."""
    folder = tmp_path_factory.mktemp("data")
    raw, store, rules = Store(str(folder / "raw")), Store(str(folder / "dataset")), IngestRules(downsize=96)
    for name, posts in shards(plan(0, 240)):
        draw_shard(raw, name, 0, posts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "_GROUP_BYTES", 24_000)
        made = plan_shards(
            [raw.path(f"{site}/0000.parquet") for site in ("danbooru", "pixiv")], "auto", None, store, rules
        )
        for shard in made.shards.values():
            ingest_shard(shard, store.root, rules)
            downsize_shard(shard, store.root, replace(rules, downsize=512))
        for name, footer in Catalog(store).images().items():
            caption_shard(ImageShard(name, footer.rows, footer.digest), store.root, "captions")
    _curate(store, "all", Rules(min_side=64))
    _curate(store, "danbooru", Rules(min_side=64, sources=("danbooru",)))
    return store


def _curate(store: Store, name: str, rules: Rules) -> None:
    rules = with_lists(rules)
    inputs = read_inputs(store, rules)
    quality, _ = quality_table(store, f"selections/{name}", inputs, rules.preset, renew=False)
    curation = Curation(store.root, name, rules, tag_rules(rules), quality)
    curate.curate(curation, inputs, InThisProcess(), {})


def shard_of(store: Store, site: str) -> str:
    [name] = [name for name in store.shards("images") if name.startswith(site)]
    return name


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    ROW_GROUPS.forget()


def load(store: Store, crop: CropConfig = CROP, name: str = "all", **more: Any) -> TrainingData:
    selection = Selection.load(store.root, name, more.pop("resolution", None))
    return TrainingData.load(selection, crop, batch_size=BATCH, **{"streams": 4, "window": 2} | more)


def selected_ids(store: Store, name: str = "all") -> list[str]:
    folder = f"selections/{name}"
    tables = [store.read_table(f"{folder}/{shard}.parquet", ["id"]) for shard in store.shards(folder)]
    return [row for table in tables for row in table["id"].to_pylist()]


def epoch_of(data: TrainingData, number: int = 0) -> Batch:
    return load_batch(data, range(number * data.order.count, (number + 1) * data.order.count))


def same(one: Batch, two: Batch) -> bool:
    """Bit for bit."""
    return all(np.array_equal(getattr(one, field.name), getattr(two, field.name)) for field in fields(Batch))


def test_example_texts_are_of_different_rows_and_of_all_shards(dataset: Store) -> None:
    selection = Selection.load(dataset.root, "all")
    texts = example_texts(selection, 21)
    assert len(texts) == 21
    tables = [row_groups.selection_rows(dataset.root, "all", shard) for shard in selection.shards]
    of_shard = [{full_text(text_parts(row)) for row in table.to_pylist()} for table in tables]
    assert [sum(text in of for text in texts) for of in of_shard] == [10, 11]
    assert len(example_texts(selection, 10_000)) == sum(table.num_rows for table in tables)


# --- Order and reads --------------------------------------------------------------------------------------------------


def test_an_epoch_has_each_selected_id_once(dataset: Store) -> None:
    data = load(dataset)
    for number in range(2):
        assert sorted(epoch_of(data, number).ids) == sorted(selected_ids(dataset))
    assert epoch_of(data).ids != epoch_of(data, 1).ids


def test_a_batch_is_the_same_in_parts_after_pickling_and_without_a_cache(dataset: Store) -> None:
    data = load(dataset, replace(CROP, flip=0.5))
    whole = load_batch(data, range(200, 240))
    ROW_GROUPS.forget()
    sent = pickle.loads(pickle.dumps(data))
    parts = [load_batch(sent, range(start, start + 10)) for start in (230, 200, 220, 210)]
    assert same(whole, concatenate([parts[1], parts[3], parts[2], parts[0]]))
    assert whole.pixels_BHW3.shape == (40, 48, 48, 3)
    assert len(set(whole.keys_B.tolist())) == 40


def test_pixels_frame_and_text_belong_to_the_same_picture(dataset: Store) -> None:
    """Also if only some rows of a row group are selected."""
    whole = CaptionConfig(tag_dropout=0, group_dropout=0, caption_dropout=0, caption_only=0, tags_only=0)
    data = load(dataset, replace(CROP, captions=whole, resolution=64), name="danbooru")
    file = f"{shard_of(dataset, 'danbooru')}.parquet"
    rows = {row["id"]: row for row in dataset.read_table(f"selections/danbooru/{file}").to_pylist()}
    images = {row["id"]: row["image"] for row in dataset.read_table(f"images/{file}").to_pylist()}
    assert len(rows) < len(images), "some are not selected"
    batch = load_batch(data, range(30))
    for at, name in enumerate(batch.ids):
        assert sorted(batch.texts[at].split(", ")) == sorted(full_text(text_parts(rows[name])).split(", "))
        across, down, _ = keyed_uniform(batch.keys_B[at : at + 1], 3, Stream.CROP)[0].tolist()
        cut = square_crop(images[name], 64, across, down)
        assert isinstance(cut, Crop)
        np.testing.assert_array_equal(batch.pixels_BHW3[at], cut.pixels_HWC)
        assert batch.frame_B4[at].tolist() == [cut.x0, cut.y0, cut.width, cut.height]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Shard and number of every row group read from now on."""
    found: list[tuple[str, int]] = []
    read = row_groups._pictures

    def counted(selection: Selection, shard: str, group: int) -> pa.Table:
        found.append((shard, group))
        return read(selection, shard, group)

    monkeypatch.setattr(row_groups, "_pictures", counted)
    return found


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_epoch_reads_about_the_bytes_of_its_row_groups(
    dataset: Store, reads: list[tuple[str, int]], workers: int
) -> None:
    data, ids = load(dataset, workers=workers), list[str]()
    steps = -(-2 * data.order.count // BATCH)
    for rank in range(workers):
        ROW_GROUPS.forget()  # each worker is a process of its own
        for step in range(steps):
            [positions] = micro_batches(step, BATCH, rank, workers, BATCH // workers)
            ids += load_batch(data, positions).ids
    footers = {
        shard: pq.read_metadata(dataset.path(f"images/{shard}.parquet")) for shard in data.row_index.selection.shards
    }

    def pictures(shard: str, group: int) -> int:
        column = footers[shard].row_group(group).column(IMAGES.get_field_index("image"))
        assert column.path_in_schema == "image"
        return int(column.total_compressed_size)

    index = data.row_index
    shard_names = np.array(index.selection.shards)[index.shard_G]
    selected = sum(pictures(*place) for place in zip(shard_names.tolist(), index.group_G.tolist(), strict=True))
    assert len(index.group_G) > 60, "enough row groups for a share"
    assert Counter(ids).most_common(1)[0][1] <= 3, "two epochs, and the first part of a third to fill the last batch"
    read = sum(pictures(*place) for place in reads)
    assert selected <= read <= 2 * 1.1 * selected


# --- Held out ---------------------------------------------------------------------------------------------------------


def test_all_pictures_are_either_held_out_or_trained_on(dataset: Store) -> None:
    data = load(dataset, hold_out=0.2)
    held = held_out_batch(data, range(data.row_index.held_out_count))
    trained = epoch_of(data)
    assert not set(held.ids) & set(trained.ids)
    assert sorted(held.ids + trained.ids) == sorted(selected_ids(dataset))
    assert 0.1 < len(held.ids) / len(trained.ids) < 0.4


def test_held_out_pictures_do_not_depend_on_the_selection_and_are_nested_by_share(dataset: Store) -> None:
    data, part = load(dataset, hold_out=0.2), load(dataset, hold_out=0.2, name="danbooru")
    held = held_out_batch(data, range(data.row_index.held_out_count)).ids
    held_of_part = held_out_batch(part, range(part.row_index.held_out_count)).ids
    assert held_of_part == [name for name in held if name in set(selected_ids(dataset, "danbooru"))]
    assert 0 < len(held_of_part) < len(held)
    fewer = load(dataset, hold_out=0.05)
    assert 0 < fewer.row_index.held_out_count < len(held)
    assert held_out_batch(fewer, range(fewer.row_index.held_out_count)).ids == held[: fewer.row_index.held_out_count]


def test_a_held_out_sample_is_the_centre_crop_with_full_text_and_its_own_key(dataset: Store) -> None:
    data = load(dataset, hold_out=0.2)
    batch = held_out_batch(data, [3, 0])
    stage = load(dataset, replace(CROP, seed=6, flip=1.0), hold_out=0.1, window=1)
    assert same(batch, held_out_batch(stage, [3, 0]))
    assert same(batch, concatenate([held_out_batch(data, [3]), held_out_batch(data, [0])]))
    x0, y0, width, height = batch.frame_B4.T
    assert np.abs(2 * x0 + 48 - width).max() <= 1
    assert np.abs(2 * y0 + 48 - height).max() <= 1
    assert not set(batch.keys_B.tolist()) & set(epoch_of(data).keys_B.tolist())
    rows = [row for shard in dataset.shards("selections/all") for row in _selected(dataset, shard)]
    texts = {row["id"]: full_text(text_parts(row)) for row in rows}
    assert batch.texts == [texts[name] for name in batch.ids]


def _selected(dataset: Store, shard: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = dataset.read_table(f"selections/all/{shard}.parquet").to_pylist()
    return rows


def test_the_held_out_share_is_the_requested_one() -> None:
    names = pa.array([f"danbooru:{number}" for number in range(10_000)] + [f"pixiv:{n}_p0" for n in range(10_000)])
    for share in (0.01, 0.5):
        held = held_out(id_hash(names), share)
        for part in (held[:10_000], held[10_000:]):
            assert abs(part.mean() - share) < 4 * (share * (1 - share) / 10_000) ** 0.5
    assert not held_out(id_hash(names), 0.0).any()


def test_the_hash_of_an_id_does_not_depend_on_its_neighbours() -> None:
    names = ["pixiv:12", "", "danbooru:1234567", "pixiv:12345678_p10", "é", "danbooru:1234568"]
    together = id_hash(pa.array(names))
    assert len(set(together.tolist())) == len(names)
    alone = [id_hash(pa.array([name]))[0] for name in names]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[2:5], id_hash(pa.array(names)[2:5]))
    np.testing.assert_array_equal(together, id_hash(pa.chunked_array([names[:2], names[2:]])))


@pytest.mark.parametrize("share", [-0.1, 1.0, 0.99999])
def test_an_invalid_share_or_one_that_leaves_nothing_is_refused(dataset: Store, share: float) -> None:
    with pytest.raises(UsageError, match="hold_out"):
        load(dataset, hold_out=share)


# --- Broken files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(dataset: Store, tmp_path: Path) -> Store:
    """A copy of the dataset that a test may damage."""
    shutil.copytree(dataset.root, tmp_path / "dataset")
    return Store(str(tmp_path / "dataset"))


def rewrite(store: Store, shard: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrites a shard of pictures with the same row groups and changed rows."""
    name = f"images/{shard}.parquet"
    with store.open(name) as file:
        parquet = pq.ParquetFile(file)
        groups = [parquet.read_row_group(group).to_pylist() for group in range(parquet.metadata.num_row_groups)]
    with store.writing_table(name, IMAGES) as write:
        for rows in groups:
            write(pa.Table.from_pylist([change(row) for row in rows], IMAGES))


def test_an_unreadable_picture_is_replaced_by_the_next_of_its_row_group_and_listed(broken: Store) -> None:
    data = load(broken)
    sound = epoch_of(data)
    index = data.row_index
    group = int(np.flatnonzero((index.counts_G > 2) & (index.shard_G == 0))[3])
    ids = selected_ids(broken)[index.counts_G[:group].sum() :][: index.counts_G[group]]
    ROW_GROUPS.forget()
    last, first = ids[-1], ids[0]
    rewrite(broken, index.selection.shards[0], lambda row: row | ({"image": b"x"} if row["id"] == last else {}))
    found = epoch_of(data)
    [(name, why)] = found.replaced
    assert name == last
    assert "not an image" in why
    place = sound.ids.index(last)
    assert found.ids == [*sound.ids[:place], first, *sound.ids[place + 1 :]]
    np.testing.assert_array_equal(found.keys_B, sound.keys_B)
    others = np.arange(len(sound.ids)) != place
    np.testing.assert_array_equal(found.pixels_BHW3[others], sound.pixels_BHW3[others])
    assert same(load_batch(data, [place]), load_batch(load(broken, workers=4), [place]))
    assert load_batch(data, [place]).ids == [first]


def test_a_damaged_row_group_is_replaced_by_the_pictures_of_the_next(broken: Store) -> None:
    data = load(broken)
    sound, index = epoch_of(data), data.row_index
    ROW_GROUPS.forget()
    path = Path(broken.path(f"images/{index.selection.shards[0]}.parquet"))
    lost, place = 4, int(index.group_G[4])
    column = pq.read_metadata(path).row_group(place).column(IMAGES.get_field_index("image"))
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 64] = bytes([255]) * 64
    path.write_bytes(content)
    found = epoch_of(data)
    of_group = [selected_ids(broken)[index.counts_G[:g].sum() :][: index.counts_G[g]] for g in (lost, lost + 1)]
    assert sorted(name for name, _ in found.replaced) == sorted(of_group[0])
    reasons = {lost_row_group(why) for _, why in found.replaced}
    assert reasons == {f"row group {place} of {index.selection.shards[0]} cannot be read"}
    changed = [(a, b) for a, b in zip(sound.ids, found.ids, strict=True) if a != b]
    assert sorted(a for a, _ in changed) == sorted(of_group[0])
    assert {b for _, b in changed} <= set(of_group[1])
    assert len({b for _, b in changed}) == min(map(len, of_group))


def test_a_lost_shard_is_replaced_and_a_lost_dataset_ends_the_job(broken: Store) -> None:
    data = load(broken)
    danbooru, pixiv = data.row_index.selection.shards
    Path(broken.path(f"images/{pixiv}.parquet")).unlink()
    found = epoch_of(data)
    assert sorted(name for name, _ in found.replaced) == sorted(row["id"] for row in _selected(broken, pixiv))
    assert "FileNotFoundError" in found.replaced[0][1]
    ROW_GROUPS.forget()
    Path(broken.path(f"images/{danbooru}.parquet")).unlink()
    with pytest.raises(JobFailed, match=r"cannot be read: FileNotFoundError.*repair"):
        load_batch(data, range(8))


def test_a_dataset_out_of_reach_loses_no_picture_and_is_read_when_it_is_back(broken: Store) -> None:
    data, with_held_out = load(broken), load(broken, hold_out=0.2)
    whole = epoch_of(data)
    ROW_GROUPS.forget()
    root = Path(broken.root)
    away = root.rename(root.with_name("away"))
    try:
        for read in (lambda: epoch_of(data), lambda: held_out_batch(with_held_out, [0])):
            with pytest.raises(StorageUnavailable, match=r"cannot be read on .*No such file"):
                read()
    finally:
        away.rename(root)
    assert same(epoch_of(data), whole)


def test_a_read_that_fails_for_a_moment_loses_no_picture(dataset: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data, pauses, read = load(dataset), list[float](), row_groups._pictures
    whole = epoch_of(data)
    row_groups_read = Counter[int]()

    def fails_twice(selection: Selection, shard: str, group: int) -> pa.Table:
        row_groups_read[group] += 1
        if row_groups_read[group] <= 2:
            raise OSError(errno.EIO, "Input/output error")
        return read(selection, shard, group)

    ROW_GROUPS.forget()
    monkeypatch.setattr(row_groups, "_pictures", fails_twice)
    sleep = time.sleep

    def paused(seconds: float) -> None:
        if threading.current_thread().name.startswith("row-group"):
            pauses.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(row_groups.time, "sleep", paused)
    assert same(epoch_of(data), whole)
    assert pauses[:2].count(0.5) >= 1
    assert set(pauses) == {0.5, 2.0}


def test_an_unreadable_held_out_picture_is_replaced(broken: Store) -> None:
    data = load(broken, hold_out=0.2)
    [name, following] = held_out_batch(data, [4, 5]).ids
    shard = next(shard for shard in data.row_index.selection.shards if shard.startswith(name.partition(":")[0]))
    rewrite(broken, shard, lambda row: row | ({"image": b"x"} if row["id"] == name else {}))
    found = held_out_batch(data, [4, 5])
    assert found.ids == [following, following]
    assert [pair[0] for pair in found.replaced] == [name]


def test_pictures_ingested_again_after_the_selection_are_refused(broken: Store) -> None:
    data = load(broken)
    rewrite(broken, data.row_index.selection.shards[0], lambda row: row | {"id": row["id"] + "0"})
    with pytest.raises(ValueError, match=r"other rows than the selection 'all'.*curate"):
        epoch_of(data)


def same_index(one: RowIndex, two: RowIndex) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in _ARRAYS)


def test_a_cached_row_index_equals_the_built_one_and_opens_no_shard(broken: Store, tmp_path: Path) -> None:
    selection = Selection.load(broken.root, "all")
    first = RowIndex.load_or_build(str(tmp_path), selection, 0.2)
    assert same_index(first, RowIndex.build(selection, 0.2))
    for shard in selection.shards:  # the listing of the pictures is unchanged
        broken.remove(f"selections/all/{shard}.parquet")
    assert same_index(RowIndex.load_or_build(str(tmp_path), selection, 0.2), first)


def test_a_row_index_is_rebuilt_if_any_of_its_inputs_changed(broken: Store, tmp_path: Path) -> None:
    selection, kept = Selection.load(broken.root, "all"), str(tmp_path)
    with_held_out = RowIndex.load_or_build(kept, selection, 0.2)
    assert RowIndex.load_or_build(kept, selection, 0.0).held_out_count == 0 < with_held_out.held_out_count
    assert RowIndex.load_or_build(kept, Selection.load(broken.root, "danbooru")).count < selection.count
    (tmp_path / ROW_INDEX_FILE).write_bytes(b"half")
    assert RowIndex.load_or_build(kept, selection).count == selection.count
    shard = selection.shards[0]
    pictures = broken.read_table(f"images/{shard}.parquet")
    broken.write_table(f"images/{shard}.parquet", pictures.slice(0, 1), IMAGES)
    with pytest.raises(ValueError, match="other rows than the selection"):
        RowIndex.load_or_build(kept, selection)


# --- Tiers and mirroring ----------------------------------------------------------------------------------------------


def test_the_smallest_sufficient_and_complete_tier_is_read(broken: Store) -> None:
    def folder(resolution: int | None) -> str:
        return Selection.load(broken.root, "all", resolution).images

    assert {side: folder(side) for side in (64, 96, 97, 512, 513, 1024)} == {
        64: "images-96", 96: "images-96", 97: "images-512", 512: "images-512", 513: "images", 1024: "images",
    }  # fmt: skip
    assert folder(None) == "images"
    broken.remove(f"images-512/{shard_of(broken, 'pixiv')}.parquet")
    assert folder(512) == "images"
    assert Selection.load(broken.root, "danbooru", 512).images == "images-512", "complete for this selection"


def test_a_tier_gives_the_same_pictures(dataset: Store) -> None:
    large, small = epoch_of(load(dataset)), load(dataset, resolution=48)
    assert small.row_index.selection.images == "images-96"
    positions = np.argsort(small.order.samples(range(small.order.count)))
    by_id = dict(zip(large.ids, large.pixels_BHW3, strict=True))
    batch = load_batch(small, positions)
    assert batch.ids == selected_ids(dataset), "in the order of their numbers"
    centred = (
        held_out_batch(load(dataset, hold_out=0.1), range(8)),
        held_out_batch(load(dataset, hold_out=0.1, resolution=48), range(8)),
    )
    assert set(batch.ids) == set(by_id)
    assert centred[0].ids == centred[1].ids
    differences = np.abs(centred[0].pixels_BHW3.astype(int) - centred[1].pixels_BHW3)
    assert differences.mean() < 4, "of 255"


def test_mirroring_flips_pixels_and_frame_of_pictures_without_writing(dataset: Store) -> None:
    plain, turned, half = (epoch_of(load(dataset, replace(CROP, flip=flip))) for flip in (0.0, 1.0, 0.5))
    assert plain.ids == turned.ids == half.ids
    assert plain.texts == turned.texts == half.texts
    rows = {row["id"]: row for shard in dataset.shards("selections/all") for row in _selected(dataset, shard)}
    may = np.array([can_mirror(text_parts(rows[name])) for name in plain.ids])
    assert 0.5 < may.mean() < 1, "some are signed"
    x0, y0, width, height = plain.frame_B4.T
    frame_B4 = np.stack([width - x0 - 48, y0, width, height], axis=1)
    np.testing.assert_array_equal(turned.frame_B4, np.where(may[:, None], frame_B4, plain.frame_B4))
    np.testing.assert_array_equal(
        turned.pixels_BHW3, np.where(may[:, None, None, None], plain.pixels_BHW3[:, :, ::-1], plain.pixels_BHW3)
    )
    as_turned = (half.pixels_BHW3 == turned.pixels_BHW3).all(axis=(1, 2, 3))
    as_plain = (half.pixels_BHW3 == plain.pixels_BHW3).all(axis=(1, 2, 3))
    assert (as_plain | as_turned).all()
    assert 0.35 < as_turned[may].mean() < 0.65


def test_a_mirrored_crop_is_the_crop_of_the_mirrored_picture() -> None:
    """Including its frame."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)

    def png(pixels_HWC: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels_HWC).save(buffer, "PNG")
        return buffer.getvalue()

    cut = square_crop(png(pixels), 40, 0.3, 0.0)
    assert isinstance(cut, Crop)
    turned = mirrored(cut)
    across = (turned.x0 + 0.5) / (turned.width - 40 + 1)
    expected = square_crop(png(pixels[:, ::-1]), 40, across, 0.0)
    assert isinstance(expected, Crop)
    assert (expected.x0, expected.y0, expected.width) == (turned.x0, turned.y0, turned.width)
    assert np.abs(expected.pixels_HWC.astype(int) - turned.pixels_HWC).max() <= 1


@pytest.mark.parametrize(
    ("parts", "may"),
    [
        (TextParts(general=("long hair", "looking at viewer")), True),
        (TextParts(general=("bright sky", "context", "leftover")), True),
        (TextParts(general=("looking left",)), False),
        (TextParts(caption="A girl on the Right of a tree."), False),
        (TextParts(general=("english text",)), False),
        (TextParts(meta=("4koma",)), False),
        (TextParts(general=("speech bubble",)), False),
        (TextParts(general=("文字入り",)), False),
    ],
)
def test_pictures_whose_text_mentions_sides_or_writing_are_never_mirrored(parts: TextParts, may: bool) -> None:
    assert can_mirror(parts) == may


@pytest.mark.parametrize("flip", [-0.1, 1.5])
def test_an_invalid_flip_probability_is_refused(flip: float) -> None:
    with pytest.raises(ValueError, match="flip"):
        replace(CROP, flip=flip)


def test_joined_batches_are_taken_apart_again() -> None:
    def batch(first: int, count: int) -> Batch:
        numbers = np.arange(first, first + count)
        pixels = np.broadcast_to(numbers[:, None, None, None].astype(np.uint8), (count, 2, 2, 3))
        frame = np.broadcast_to(numbers[:, None].astype(np.float32), (count, 4))
        names = [str(number) for number in numbers]
        return Batch(names, pixels, frame, [f"text {name}" for name in names], numbers, [(names[0], "damaged")])

    joined = concatenate([batch(0, 2), batch(2, 3)])
    assert joined.ids == ["0", "1", "2", "3", "4"]
    assert joined.replaced == [("0", "damaged"), ("2", "damaged")]
    taken = joined.take([4, 0, 3])
    assert (taken.ids, taken.texts) == (["4", "0", "3"], ["text 4", "text 0", "text 3"])
    for values in (taken.pixels_BHW3[:, 0, 0, 0], taken.frame_B4[:, 0], taken.keys_B):
        assert values.tolist() == [4, 0, 3]


def test_row_groups_in_memory_are_not_mixed_up_between_selections_that_hold_out_other_shares(dataset: Store) -> None:
    ROW_GROUPS.forget()
    fresh = epoch_of(load(dataset, hold_out=0.2))
    ROW_GROUPS.forget()
    epoch_of(load(dataset))
    assert same(epoch_of(load(dataset, hold_out=0.2)), fresh)
