"""Partial files of captions -> the finished shard; and which rows of a shard have no caption yet."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from captioner.answers import repeated_captions
from captioner.captioning import MODEL_FAILURES
from captioner.engines.tags import TAG_ENGINE, caption_from_tags
from captioner.requests import CaptionReason, CaptionRequest
from pipeline.captions.caption_rows import KIND, CaptionShard
from pipeline.captions.tag_captions import ImageShard, read_requests, write_captions
from pipeline.storage.fingerprints import Provenance
from pipeline.storage.partial import PartialShard
from pipeline.storage.shards import Store

Row = dict[str, Any]  # of CAPTIONS


def unfinished_rows(
    part: ImageShard, store: Store, folder: str, provenance: Provenance, *, retry: bool, started: bool
) -> tuple[CaptionShard, NDArray[np.int32]]:
    """The shard, and the numbers of its rows without a caption. `retry`: if the shard is finished, those that its
    engine or model failed on. `started`: it may have partial files."""
    rows = np.arange(part.rows, dtype=np.int32)
    attempts: dict[int, int] = {}
    name = f"{folder}/{part.shard}.parquet"
    finished = retry and store.exists(name) and json.loads(store.metadata(name).get("made_from", "{}")) == provenance
    if finished:
        table = store.read_table(name, ["reason", "attempts"])
        rows = np.flatnonzero(pc.is_in(table["reason"], pa.array(sorted(MODEL_FAILURES)))).astype(np.int32)
        before = pc.fill_null(table["attempts"], 0).to_numpy()
        attempts = {row: int(before[row]) for row in rows.tolist() if before[row]}
    shard = CaptionShard(**vars(part), made_from=json.dumps(provenance), finished=finished, attempts=attempts)
    if started:
        partial_files = partial_shard(shard, store, folder)
        _convert_former_files(partial_files)
        done = partial_files.rows(KIND)
        if finished and len(done):
            done = np.array([row for row, _ in _later_rows(shard, partial_files)], np.int32)
        rows = np.setdiff1d(rows, done)
    return shard, rows


def commit_shard(shard: CaptionShard, dataset: str, folder: str) -> Counter[str]:
    """Writes <folder>/<shard>: the rows of images/<shard> in their order. Returns the number of rows, by reason, whose
    captions only the whole shard shows to be unusable. Raises ValueError if rows are missing."""
    store, name = Store(dataset), f"{folder}/{shard.shard}.parquet"
    requests = read_requests(store, shard.shard)
    before: list[Row] = store.read_table(name).to_pylist() if shard.finished else []
    rows = {number: row for number, row in enumerate(before) if row["reason"] not in MODEL_FAILURES}
    later = dict(_later_rows(shard, partial_shard(shard, store, folder)))
    rows |= later
    if missing := len(requests) - len(rows):
        raise ValueError(f"{missing} of {len(requests)} rows have no caption; run the same command again")
    final = replace_repeated([rows[number] for number in range(len(requests))], requests)
    write_captions(store, name, final, json.loads(shard.made_from))
    partial_shard(shard, store, folder).remove()
    repeated = sum(final[number]["reason"] == CaptionReason.REPEATED for number in later)
    return Counter({str(CaptionReason.REPEATED): repeated} if repeated else {})


def replace_repeated(rows: list[Row], requests: Sequence[CaptionRequest]) -> list[Row]:
    """The rows of a shard, in which captions that the model gave to many pictures are replaced by those of the tags."""
    repeated = repeated_captions({row["id"]: row["caption"] for row in rows if row["reason"] is None})
    replaced = {"reason": str(CaptionReason.REPEATED), "notes": [], **TAG_ENGINE}
    return [
        row | replaced | {"caption": caption_from_tags(request).caption} if row["id"] in repeated else row
        for row, request in zip(rows, requests, strict=True)
    ]


def partial_shard(shard: CaptionShard, store: Store, folder: str) -> PartialShard:
    return PartialShard(store, folder, shard.shard, shard.made_from)


def _later_rows(shard: CaptionShard, partial_files: PartialShard) -> Iterator[tuple[int, Row]]:
    """Numbers and content of the partial rows. A job that was killed after it wrote the shard may have left rows that
    have no more attempts than the shard's: those are left out."""
    for numbers, table in partial_files.contents(KIND):
        for number, row in zip(numbers.tolist(), table.to_pylist(), strict=True):
            if row["attempts"] > shard.attempts.get(number, -1):
                yield number, row


def _convert_former_files(partial_files: PartialShard) -> None:
    """Partial files were named by random digits and had no row numbers. Gives theirs to those that are made from the
    same; the others are removed by PartialShard.rows."""
    store, path = partial_files.store, partial_files.path
    former = [f"{path}/{file}.parquet" for file in store.shards(path) if re.fullmatch("[0-9a-f]{32}", file)]
    if not former:
        return
    ids = store.read_table(f"images/{partial_files.shard}.parquet", ["id"])["id"].to_pylist()
    number_of = {id: number for number, id in enumerate(ids)}
    for name in former:
        if store.metadata(name).get("made_from") == partial_files.made_from:
            table = store.read_table(name)
            numbers = np.array([number_of[id] for id in table["id"].to_pylist()], np.int32)
            partial_files.write(KIND, numbers, table)
            store.remove(name)
