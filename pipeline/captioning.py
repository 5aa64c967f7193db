"""One shard of images -> one shard of captions. Runs in a Ray task; knows nothing of Ray."""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from captioner.engines import ENGINES
from captioner.requests import Request
from pipeline.records import CAPTIONS, TAG_CATEGORIES
from pipeline.shards import Store
from pipeline.tags import TagReader

_COLUMNS = ["id", *(f"tags_{category}" for category in TAG_CATEGORIES)]


@dataclass(frozen=True)
class ImageShard:
    """A finished shard of images."""

    shard: str
    rows: int
    digest: str  # of its footer


def caption_shard(part: ImageShard, dataset: str, engine_name: str) -> None:
    """Write captions/<shard>: the rows of images/<shard>, in their order, each with a caption or the reason for having
    none."""
    store = Store(dataset)
    engine = ENGINES[engine_name]()
    images = store.read_table(f"images/{part.shard}.parquet", _COLUMNS).to_pylist()
    reader = TagReader()
    answers = {answer.id: answer for answer in engine.caption([_request(row, reader) for row in images])}
    rows = [
        {
            "id": row["id"],
            "caption": answers[row["id"]].caption,
            "reason": answers[row["id"]].reason,
            "engine": engine.name,
            "model": engine.model,
            "prompt_version": engine.prompt_version,
        }
        for row in images
    ]
    made = json.dumps({"images": part.digest})
    store.write_table(
        f"captions/{part.shard}.parquet", pa.RecordBatch.from_pylist(rows, CAPTIONS), CAPTIONS, made_from=made
    )


def _request(row: dict[str, Any], reader: TagReader) -> Request:
    return Request(row["id"], reader.text_parts({category: row[f"tags_{category}"] for category in TAG_CATEGORIES}))
