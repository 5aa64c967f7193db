"""Captions of one image shard from its tags, in a Ray task; and the row of a caption, also of a model's.

Knows nothing of Ray.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from captioner.captioning import Outcome
from captioner.engines.tags import TAG_ENGINE, caption_from_tags
from captioner.requests import CaptionRequest
from pipeline.captions.engine_config import CaptionSettings
from pipeline.core.records import CAPTIONS, TAG_CATEGORIES
from pipeline.storage.fingerprints import Provenance
from pipeline.storage.manifest import Catalog, Footer
from pipeline.storage.posts import posts_digests, read_images
from pipeline.storage.shards import Store
from pipeline.tagging.tags import TagReader

TAG_COLUMNS: Final = ["id", *(f"tags_{category}" for category in TAG_CATEGORIES)]


@dataclass(frozen=True)
class ImageShard:
    """A finished shard of images."""

    shard: str
    rows: int
    digest: str  # of its footer
    largest_group: int = 0  # bytes of the largest row group, uncompressed
    posts: str = ""  # digest of posts/<shard>, "" if there is none

    @property
    def tag_provenance(self) -> Provenance:
        """What captions from tags are made from."""
        return {"images": self.digest} | ({"posts": self.posts} if self.posts else {})


def image_shards(catalog: Catalog, images: Mapping[str, Footer]) -> dict[str, ImageShard]:
    """All image shards by name. Raises UsageError as `posts_digests`."""
    posts = posts_digests(catalog, images)
    return {
        shard: ImageShard(shard, file.rows, file.digest, file.largest_group, posts.get(shard, ""))
        for shard, file in images.items()
    }


def caption_shard(part: ImageShard, dataset: str, folder: str) -> Counter[str]:
    """Write <folder>/<shard>: the rows of images/<shard> in their order, each with a caption or the reason why there is
    none. Returns the number of rows that are "captioned", and of others by reason."""
    store = Store(dataset)
    rows = [caption_row(Outcome(caption_from_tags(request))) for request in read_requests(store, part.shard)]
    write_captions(store, f"{folder}/{part.shard}.parquet", rows, part.tag_provenance)
    return Counter(row["reason"] or "captioned" for row in rows)


def read_requests(store: Store, shard: str) -> list[CaptionRequest]:
    """The requests for all rows of an image shard, with the tags that ingest.py --refresh has brought up to date."""
    reader = TagReader()
    rows = read_images(store, shard, TAG_COLUMNS).to_pylist()
    return [request_from_row(row, reader) for row in rows]


def request_from_row(row: dict[str, Any], reader: TagReader) -> CaptionRequest:
    """The request for a row of IMAGES."""
    parts = reader.text_parts({category: row[f"tags_{category}"] for category in TAG_CATEGORIES})
    return CaptionRequest(row["id"], parts)


def write_captions(store: Store, name: str, rows: list[dict[str, Any]], provenance: Provenance) -> None:
    table = pa.RecordBatch.from_pylist(rows, CAPTIONS)
    store.write_table(name, table, CAPTIONS, made_from=json.dumps(provenance))


def caption_row(outcome: Outcome, settings: CaptionSettings | None = None) -> dict[str, Any]:
    """A row of CAPTIONS. `settings` are those of the model that was asked, if any; the caption is the model's unless it
    has a reason."""
    answer = outcome.answer
    made_by: dict[str, str] = TAG_ENGINE
    if settings and answer.reason is None:
        made_by = {
            "engine": settings.engine, "model": settings.model, "prompt_version": settings.prompt_version,
        }  # fmt: skip
    return {
        "id": answer.id,
        "caption": answer.caption,
        "reason": None if answer.reason is None else str(answer.reason),
        **made_by,
        "attempts": outcome.attempts if settings else None,
        "finish_reason": outcome.finish_reason,
        "tokens_in": outcome.tokens_in if settings else None,
        "tokens_out": outcome.tokens_out if settings else None,
        "notes": [str(note) for note in answer.notes],
    }
