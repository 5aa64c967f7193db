"""The rules of curation: which rows one training stage uses, and the text parts of each. Knows nothing of Ray.

Two passes over the dataset, neither of which reads a picture: `survey` collects what the rules must know about all rows
at once (popularity, duplicates); `select_shard` then judges each row.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dedup import keepers
from pipeline.quality import PRESETS, RATING_WORDS, Posts, QualityTable, era_words
from pipeline.records import REJECTED, SELECTION, TAG_CATEGORIES
from pipeline.shards import Store
from pipeline.tags import EXCLUDED, TagReader, TagRules, without_separators

Refusal = tuple[str, str]  # reason, detail

_SURVEY = ["id", "source", "sha256", "phash", "width", "height", "rating", "favourites", "created_at"]
_JUDGE = [*_SURVEY, *(f"tags_{category}" for category in TAG_CATEGORIES)]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a stage asks of a picture."""

    min_side: int  # pixels of the shorter side: below it the crop would be enlarged
    max_aspect: float = 4.0  # longer side / shorter side
    ratings: tuple[str, ...] = ("general", "sensitive", "questionable", "explicit")
    excluded: tuple[str, ...] = tuple(sorted(EXCLUDED))  # raw tags that a picture must not have
    preset: str = "kohaku"  # of the quality words
    quality: tuple[str, ...] = ()  # only pictures with one of these words; () asks nothing
    eras: tuple[str, ...] = ()  # the same


# At 64 pixels a second object or a spoilt picture only blurs the lesson.
_DEMO_EXCLUDED = ("blurry", "film_grain", "multiple_objects")

# The 1024 stage keeps both ends on purpose, so that negative prompts work (HDM report, section 4.2).
RULES = {
    "demo": Rules(min_side=64, excluded=tuple(sorted(EXCLUDED)) + _DEMO_EXCLUDED),
    "256": Rules(min_side=256),
    "512": Rules(min_side=384),
    "768": Rules(min_side=512),
    "1024": Rules(
        min_side=768,
        quality=("masterpiece", "best quality", "low quality", "worst quality"),
        eras=("newest", "recent", "old"),
    ),
}


@dataclass(frozen=True)
class ShardRows:
    """One shard to be judged, with what the survey found out about its rows."""

    shard: str
    copies: list[Refusal | None]  # by row: why it is only a copy of another row, where it is


def survey(dataset: str, shards: list[str], preset: str) -> tuple[QualityTable, list[ShardRows]]:
    """What must be known about all rows at once: how popular is popular, and which rows are the same picture."""
    store = Store(dataset)
    with ThreadPoolExecutor(8) as readers:
        tables = list(readers.map(lambda shard: store.read_table(f"images/{shard}.parquet", _SURVEY), shards))
    table = pa.concat_tables(tables)
    copies = _copies(table)
    ends = np.cumsum([0, *(part.num_rows for part in tables)])
    plan = [ShardRows(shard, copies[ends[i] : ends[i + 1]]) for i, shard in enumerate(shards)]
    return QualityTable.compute(PRESETS[preset], _posts(table)), plan


def _copies(table: pa.Table) -> list[Refusal | None]:
    """For each row why it is a copy: of a row before it with the same id, or of the picture that is kept instead."""
    first_row: dict[str, int] = {}
    for row, row_id in enumerate(table["id"].to_pylist()):
        first_row.setdefault(row_id, row)
    copies: list[Refusal | None] = [("duplicate id", "of a row before it")] * table.num_rows
    distinct = table.take(pa.array(first_row.values(), pa.int64()))
    width, height = (distinct[side].to_numpy().astype(np.int64) for side in ("width", "height"))
    kept = keepers(
        distinct["id"].to_pylist(),
        distinct["sha256"].to_pylist(),
        distinct["phash"].to_numpy(),
        pixels=width * height,
        aspect=width / height,
    )
    for row, keeper in zip(first_row.values(), kept, strict=True):
        copies[row] = None if keeper is None else ("duplicate", f"of {keeper}")
    return copies


def select_shard(part: ShardRows, dataset: str, name: str, rules: Rules, quality: QualityTable) -> None:
    """Write selections/<name>/<shard> and selections/<name>/rejected/<shard>: every row of images/<shard> is in one of
    them. The selected rows are committed last."""
    store = Store(dataset)
    images = store.read_table(f"images/{part.shard}.parquet", _JUDGE)
    captions = store.read_table(f"captions/{part.shard}.parquet", ["id", "caption"])
    if not images["id"].equals(captions["id"]):
        raise ValueError(
            f"captions/{part.shard}.parquet is of other rows than images/{part.shard}.parquet, made from another "
            "ingest: remove it and run pipeline/caption.py again"
        )
    reader = TagReader(TagRules(excluded=frozenset(rules.excluded)))
    kept, refused = [], []
    rows = images.to_pylist()
    texts = _texts(rows, captions["caption"].to_pylist(), _posts(images), quality, reader)
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        refusal = part.copies[number] or _refusal(row, text, rules, reader)
        if refusal:
            refused.append({"key": row["id"], "reason": refusal[0], "detail": refusal[1], "sha256": row["sha256"]})
        else:
            kept.append({"id": row["id"], "row": number, **text})
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    folder = f"selections/{name}"
    store.write_table(f"{folder}/rejected/{part.shard}.parquet", pa.Table.from_pylist(refused, REJECTED), REJECTED)
    store.write_table(f"{folder}/{part.shard}.parquet", pa.Table.from_pylist(kept, SELECTION), SELECTION, digest=digest)


def _texts(
    rows: list[dict[str, Any]], captions: list[str | None], posts: Posts, quality: QualityTable, reader: TagReader
) -> Iterator[dict[str, Any]]:
    """The text parts of each row, in the columns of SELECTION."""
    described = zip(rows, captions, quality.judge(posts), era_words(posts.created_at), strict=True)
    for row, caption, quality_word, era in described:
        yield {
            **reader.text_parts({category: row[f"tags_{category}"] for category in TAG_CATEGORIES}),
            "caption": caption and without_separators(caption),
            "quality": quality_word,
            "era": era,
            "rating": RATING_WORDS.get(row["rating"]),
        }


def _posts(table: pa.Table) -> Posts:
    return Posts(
        source=table["source"].to_pylist(),
        rating=table["rating"].to_pylist(),
        created_at=table["created_at"].to_numpy(),
        popularity=table["favourites"].cast(pa.float64()).to_numpy(),
    )


def _refusal(row: dict[str, Any], text: dict[str, Any], rules: Rules, reader: TagReader) -> Refusal | None:
    """Why the row is left out, or None: the first rule that applies, in a fixed order."""
    short, long = sorted((row["width"], row["height"]))
    size = f"{row['width']} x {row['height']}"
    tag = reader.exclusion(tag for category in TAG_CATEGORIES for tag in row[f"tags_{category}"])
    if tag:
        return f"tag {tag}", ""
    if row["rating"] is not None and row["rating"] not in rules.ratings:
        return "rating", row["rating"]
    if short < rules.min_side:
        return "too small", f"{size}, needs {rules.min_side}"
    if long > rules.max_aspect * short:
        return "too elongated", size
    for part, words in (("quality", rules.quality), ("era", rules.eras)):
        if words and text[part] not in words:
            return f"{part} not asked for", str(text[part])
    return None
