"""Applies the rules of a stage to the rows of one shard. Pure functions.

Axes: N rows, D distinct tags, T tags of all rows concatenated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.records import TAG_CATEGORIES, Rating
from pipeline.curation.leave_out import COLUMNS as LEFT_OUT_COLUMNS
from pipeline.curation.leave_out import LeftOut
from pipeline.curation.quality import POST_COLUMNS, QualityTable, era_words, posts_of
from pipeline.curation.stage_rules import Rules
from pipeline.tagging.tag_columns import TagColumn, first_excluded
from pipeline.tagging.tags import TagReader, as_words

Refusal = tuple[str, str]  # reason, detail

TAG_COLUMNS = [f"tags_{category}" for category in TAG_CATEGORIES]
_RULE_COLUMNS = [*POST_COLUMNS, "width", "height", *TAG_COLUMNS]


@dataclass(frozen=True)
class Check:
    """The result of one rule for all rows."""

    rule: str
    refused_N: NDArray[np.bool_]
    refusal: Callable[[int], Refusal]  # of a refused row
    value: Callable[[int], str]  # the value of any row, and the value that the rule asks for


def rule_columns(rules: Rules) -> list[str]:
    """The columns of IMAGES that the rules read."""
    return list(dict.fromkeys(["id", *_RULE_COLUMNS, *(LEFT_OUT_COLUMNS if rules.leave_out else [])]))


def first_refusals(checks: Iterator[Check], rows: int) -> list[Refusal | None]:
    """For each row the refusal of the first rule that refuses it, or None."""
    refusals: list[Refusal | None] = [None] * rows
    admitted_N = np.ones(rows, bool)
    for check in checks:
        for row in np.flatnonzero(check.refused_N & admitted_N).tolist():
            refusals[row] = check.refusal(row)
        admitted_N &= ~check.refused_N
    return refusals


def checks(
    images: pa.Table,
    scores: Mapping[str, NDArray[np.float32]],
    rules: Rules,
    quality: QualityTable,
    reader: TagReader,
) -> Iterator[Check]:
    """The result of each rule, in a fixed order.

    `images` has `rule_columns` and, in a dataset with posts/, `deleted`. `scores` are by <scorer>.<label>, one per row,
    NaN if there is none.
    """
    if "deleted" in images.column_names:
        yield _deleted(images["deleted"].to_numpy())
    if rules.leave_out:
        yield _left_out(images, LeftOut.of(rules.leave_out))
    yield _words("source", "source", images["source"].to_pylist(), rules.sources)
    yield _excluded_tag(images, reader)
    if rules.required_any or rules.required_all:
        yield from _required_tags(images, rules, reader)
    # Ratings are often unknown in Pixiv's dumps: such rows are admitted if every rating is.
    ratings, all_ratings = images["rating"].to_pylist(), set(rules.ratings) >= set(Rating)
    yield _words("ratings", "rating", ratings, rules.ratings, unknown=all_ratings)
    yield from _shape(images, rules)
    yield _artists(images, rules)
    for name, words, wanted in (
        ("quality", quality.words_of(posts_of(images)), rules.quality),
        ("eras", era_words(images["created_at"].to_numpy()), rules.eras),
    ):
        yield _words(name, f"{name.removesuffix('s')} not asked for", words, wanted)
    for name, ends in rules.scores.items():
        yield _score(name, scores[name], ends.min, ends.max)


def _deleted(deleted_N: NDArray[np.bool_]) -> Check:
    return Check(
        "deleted",
        deleted_N,
        lambda row: ("deleted", "on its site, by the last ingest.py --refresh"),
        lambda row: "yes" if deleted_N[row] else "no",
    )


def _words(
    rule: str, reason: str, words: Sequence[str | None], wanted: tuple[str, ...], unknown: bool = False
) -> Check:
    """Admits rows with one of the wanted words, with `unknown` also rows without a word. () admits all rows."""
    admitted = {*wanted, None} if unknown else {*wanted}
    return Check(
        rule,
        np.array([bool(wanted) and word not in admitted for word in words], bool),
        lambda row: (reason, str(words[row])),
        lambda row: f"{words[row]}; asked for: {', '.join(wanted) or 'anything'}",
    )


def _excluded_tag(images: pa.Table, reader: TagReader) -> Check:
    columns = {category: TagColumn.of(images[f"tags_{category}"]) for category in TAG_CATEGORIES}
    tags = first_excluded(columns, reader)
    refused_N = np.zeros(images.num_rows, bool)
    refused_N[list(tags)] = True
    return Check("excluded", refused_N, lambda row: (f"tag {tags[row]}", ""), lambda row: tags.get(row, "no such tag"))


def _left_out(images: pa.Table, left_out: LeftOut) -> Check:
    refused_N = left_out.rows(images)
    return Check(
        "leave_out",
        refused_N,
        lambda row: ("left out", "by the rule leave_out"),
        lambda row: "yes" if refused_N[row] else "no",
    )


def _required_tags(images: pa.Table, rules: Rules, reader: TagReader) -> Iterator[Check]:
    columns = [TagColumn.of(images[f"tags_{category}"]) for category in TAG_CATEGORIES]
    words = [list(map(reader.name, column.distinct)) for column in columns]

    def has(tag: str) -> NDArray[np.bool_]:
        """The rows with a tag (N,)."""
        found_N, wanted = np.zeros(images.num_rows, bool), reader.name(tag)
        for column, names in zip(columns, words, strict=True):
            found_N[column.post_T[np.array([name == wanted for name in names], bool)[column.tag_T]]] = True
        return found_N

    for rule, tags, least in (
        ("required_any", rules.required_any, 1),
        ("required_all", rules.required_all, len(rules.required_all)),
    ):
        if tags:
            yield _required(rule, {tag: has(tag) for tag in tags}, least)


def _required(rule: str, found: Mapping[str, NDArray[np.bool_]], least: int) -> Check:
    """`found`: the rows that have each tag."""

    def listed(row: int) -> str:
        return ", ".join(tag for tag, has_N in found.items() if has_N[row]) or "none"

    return Check(
        rule,
        np.sum(list(found.values()), axis=0) < least,
        lambda row: ("lacks a required tag", f"has {listed(row)}"),
        lambda row: f"{listed(row)}; asked for: {', '.join(found)}",
    )


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


def _artists(images: pa.Table, rules: Rules) -> Check:
    wanted = frozenset(map(as_words, rules.artists))
    refused_N = np.zeros(images.num_rows, bool)
    if wanted:
        column = TagColumn.of(images["tags_artist"])
        wanted_D = np.array([as_words(name) in wanted for name in column.distinct], bool)
        refused_N = pc.is_in(images["source"], pa.array(rules.artist_sources, pa.string())).to_numpy().copy()
        refused_N[column.post_T[wanted_D[column.tag_T]]] = False

    def names(row: int) -> str:
        return ", ".join(as_words(name) for name in images["tags_artist"][row].as_py()) or "none"

    return Check(
        "artists",
        refused_N,
        lambda row: ("artist not asked for", names(row)),
        lambda row: f"{names(row)}; {len(wanted) or 'no'} asked for, of {', '.join(rules.artist_sources)}",
    )


def _score(name: str, scores_N: NDArray[np.float32], low: float | None, high: float | None) -> Check:
    ends = " and ".join(f"{word} {end:g}" for word, end in (("at least", low), ("at most", high)) if end is not None)
    # Comparisons with NaN are false: a row without a score is refused.
    admitted_N = (scores_N >= (-np.inf if low is None else low)) & (scores_N <= (np.inf if high is None else high))

    def value(row: int) -> str:
        return "none" if np.isnan(scores_N[row]) else f"{scores_N[row]:.4g}"

    return Check(
        f"scores {name}",
        ~admitted_N,
        lambda row: (f"score {name}", f"{value(row)}, needs {ends}"),
        lambda row: f"{value(row)}; {ends}",
    )
