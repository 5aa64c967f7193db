"""One shard of images -> one shard of captions that are put together from the tags. Runs in a Ray task; knows nothing
of Ray. What a row of captions is, is said here for a model's captions too."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from captioner.attempts import Outcome
from captioner.engines.tags import TagEngine
from captioner.requests import Request
from pipeline.captions.engine_choice import CaptionSettings
from pipeline.core.records import CAPTIONS, TAG_CATEGORIES
from pipeline.storage.shards import Store
from pipeline.tagging.tags import TagReader

TAG_COLUMNS: Final = ["id", *(f"tags_{category}" for category in TAG_CATEGORIES)]


@dataclass(frozen=True)
class ImageShard:
    """A finished shard of images."""

    shard: str
    rows: int
    digest: str  # of its footer


def caption_shard(part: ImageShard, dataset: str, folder: str) -> Counter[str]:
    """Write <folder>/<shard>: the rows of images/<shard>, in their order, each with a caption or the reason for having
    none. How many were "captioned", and were not for which reason."""
    store = Store(dataset)
    images = store.read_table(f"images/{part.shard}.parquet", TAG_COLUMNS).to_pylist()
    reader = TagReader()
    answers = TagEngine().caption([request_of(row, reader) for row in images])
    rows = [caption_row(Outcome(answer)) for answer in answers]
    table = pa.RecordBatch.from_pylist(rows, CAPTIONS)
    made = json.dumps({"images": part.digest})
    store.write_table(f"{folder}/{part.shard}.parquet", table, CAPTIONS, made_from=made)
    return Counter(row["reason"] or "captioned" for row in rows)


def request_of(row: dict[str, Any], reader: TagReader) -> Request:
    """Of a row of IMAGES."""
    return Request(row["id"], reader.text_parts({category: row[f"tags_{category}"] for category in TAG_CATEGORIES}))


def caption_row(outcome: Outcome, settings: CaptionSettings | None = None) -> dict[str, Any]:
    """A row of CAPTIONS. `settings` are those of the model that was asked, if one was: the caption is its own where it
    was not refused."""
    answer = outcome.answer
    own = settings is not None and answer.reason is None
    return {
        "id": answer.id,
        "caption": answer.caption,
        "reason": None if answer.reason is None else str(answer.reason),
        "engine": settings.engine if settings and own else TagEngine.name,
        "model": settings.model if settings and own else TagEngine.model,
        "prompt_version": settings.prompt_version if settings and own else TagEngine.prompt_version,
        "attempts": outcome.attempts if settings else None,
        "finish_reason": outcome.finish_reason,
        "tokens_in": outcome.tokens_in if settings else None,
        "tokens_out": outcome.tokens_out if settings else None,
        "notes": [str(note) for note in answer.notes],
    }
