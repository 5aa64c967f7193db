"""The rules of a stage over the rows of one shard: who is admitted, and who for which reason is not. Pure.

Axes: N rows, T tags of all rows one after the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.records import TAG_CATEGORIES, Rating
from pipeline.curation.quality import Names, Posts, QualityTable, era_words
from pipeline.curation.stage_rules import Rules
from pipeline.tagging.tag_columns import TagColumn, first_excluded
from pipeline.tagging.tags import TagReader, as_words

Refusal = tuple[str, str]  # reason, detail
Mask = NDArray[np.bool_]

POST_COLUMNS = ["source", "rating", "favourites", "created_at"]
TAG_COLUMNS = [f"tags_{category}" for category in TAG_CATEGORIES]
JUDGED_COLUMNS = [*POST_COLUMNS, "width", "height", *TAG_COLUMNS]


@dataclass(frozen=True)
class Check:
    """One rule over all rows."""

    rule: str
    refused_N: Mask
    refusal: Callable[[int], Refusal]  # of a row that is refused
    value: Callable[[int], str]  # what any row has, and what is asked of it


def judge(checks: Iterator[Check], rows: int) -> list[Refusal | None]:
    """For each row why it is not admitted: by the first rule that refuses it."""
    refusals: list[Refusal | None] = [None] * rows
    open_N = np.ones(rows, bool)
    for check in checks:
        for row in np.flatnonzero(check.refused_N & open_N).tolist():
            refusals[row] = check.refusal(row)
        open_N &= ~check.refused_N
    return refusals


def checks(
    images: pa.Table,
    scores: Mapping[str, NDArray[np.float32]],
    rules: Rules,
    quality: QualityTable,
    reader: TagReader,
) -> Iterator[Check]:
    """The rules in their fixed order. images has JUDGED_COLUMNS; scores are by <scorer>.<label>, NaN where there is no
    score."""
    posts = posts_of(images)
    yield _words("source", "source", posts.source.texts(), rules.sources)
    yield _excluded_tag(images, reader)
    # A row of unknown rating, as often in Pixiv's dumps, is admitted where every rating is.
    yield _words("ratings", "rating", posts.rating.texts(), rules.ratings, unknown=set(rules.ratings) >= set(Rating))
    yield from _shape(images, rules)
    yield _artists(images, posts, rules)
    for name, words, asked in (
        ("quality", quality.judge(posts), rules.quality),
        ("eras", era_words(posts.created_at), rules.eras),
    ):
        yield _words(name, f"{name.removesuffix('s')} not asked for", words, asked)
    for name, ends in rules.scores.items():
        yield _score(name, scores[name], ends.min, ends.max)


def posts_of(images: pa.Table) -> Posts:
    return Posts(
        source=_names(images["source"]),
        rating=_names(images["rating"]),
        created_at=images["created_at"].to_numpy(),
        popularity=images["favourites"].cast(pa.float64()).to_numpy(),
    )


def _names(column: pa.ChunkedArray) -> Names:
    encoded = column.combine_chunks().dictionary_encode()
    return Names(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist())


def _words(rule: str, reason: str, words: Sequence[str | None], asked: tuple[str, ...], unknown: bool = False) -> Check:
    """Only rows with one of the words asked for; with `unknown` also those without any. Nothing asked: all rows."""
    admitted = {*asked, *([None] if unknown else [])}
    refused = [bool(asked) and word not in admitted for word in words]
    return Check(
        rule,
        np.array(refused, bool),
        lambda row: (reason, str(words[row])),
        lambda row: f"{words[row]}; asked for: {', '.join(asked) or 'anything'}",
    )


def _excluded_tag(images: pa.Table, reader: TagReader) -> Check:
    columns = {category: TagColumn.of(images[f"tags_{category}"]) for category in TAG_CATEGORIES}
    tags = first_excluded(columns, reader)
    refused = np.zeros(images.num_rows, bool)
    refused[list(tags)] = True
    return Check("excluded", refused, lambda row: (f"tag {tags[row]}", ""), lambda row: tags.get(row, "no such tag"))


def _shape(images: pa.Table, rules: Rules) -> Iterator[Check]:
    width, height = (images[side].to_numpy().astype(np.int64) for side in ("width", "height"))
    short, long = np.minimum(width, height), np.maximum(width, height)

    def size(row: int) -> str:
        return f"{width[row]} x {height[row]}"

    yield Check(
        "min_side",
        short < rules.min_side,
        lambda row: ("too small", f"{size(row)}, needs {rules.min_side}"),
        lambda row: f"{short[row]} pixels; at least {rules.min_side}",
    )
    yield Check(
        "max_aspect",
        long > rules.max_aspect * short,
        lambda row: ("too elongated", size(row)),
        lambda row: f"{long[row] / short[row]:.3g}; at most {rules.max_aspect:g}",
    )


def _artists(images: pa.Table, posts: Posts, rules: Rules) -> Check:
    column, asked = TagColumn.of(images["tags_artist"]), frozenset(map(as_words, rules.artists))
    wanted_D = np.array([as_words(name) in asked for name in column.distinct], bool)
    refused = np.array([bool(asked) and source in rules.artist_sources for source in posts.source.texts()], bool)
    refused[column.post_T[wanted_D[column.tag_T]]] = False

    def names(row: int) -> str:
        return ", ".join(as_words(name) for name in images["tags_artist"][row].as_py()) or "none"

    return Check(
        "artists",
        refused,
        lambda row: ("artist not asked for", names(row)),
        lambda row: f"{names(row)}; {len(asked) or 'no'} asked for, of {', '.join(rules.artist_sources)}",
    )


def _score(name: str, scores_N: NDArray[np.float32], low: float | None, high: float | None) -> Check:
    ends = " and ".join(f"{word} {end:g}" for word, end in (("at least", low), ("at most", high)) if end is not None)
    inside = np.ones(len(scores_N), bool)
    if low is not None:
        inside &= scores_N >= low
    if high is not None:
        inside &= scores_N <= high

    def value(row: int) -> str:
        return "none" if np.isnan(scores_N[row]) else f"{scores_N[row]:.4g}"

    return Check(
        f"scores {name}",
        ~inside,  # also where there is no score: NaN is inside of nothing
        lambda row: (f"score {name}", f"{value(row)}, needs {ends}"),
        lambda row: f"{value(row)}; {ends}",
    )
