"""`tags.TagReader` over a column of posts at once: each distinct tag is read once, the rest is arithmetic on numbers.

Axes: N posts, T tags of all posts one after the other, D distinct tags, W distinct words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.records import TAG_CATEGORIES, TEXT_CATEGORIES
from pipeline.tags import TagReader

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class TagColumn:
    """The tags of one category."""

    post_T: Numbers  # ascending
    tag_T: Numbers  # in `distinct`
    distinct: list[str]
    posts: int

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "TagColumn":
        """Of a list<string> column without nulls."""
        lists = column.combine_chunks()
        tags = lists.flatten().dictionary_encode()
        post_T = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy(zero_copy_only=False))
        return cls(post_T, tags.indices.to_numpy().astype(np.int64), tags.dictionary.to_pylist(), len(lists))


def first_excluded(columns: Mapping[str, TagColumn], reader: TagReader) -> dict[int, str]:
    """By post: the first tag for which its picture is left out, as words, in the order of TAG_CATEGORIES."""
    found: dict[int, str] = {}
    for category in TAG_CATEGORIES:
        column = columns[category]
        names = [reader.excluded(tag) for tag in column.distinct]
        flagged_D = np.array([bool(name) for name in names], bool)
        for at in np.flatnonzero(flagged_D[column.tag_T]).tolist():
            found.setdefault(int(column.post_T[at]), names[column.tag_T[at]])
    return found


def text_columns(columns: Mapping[str, TagColumn], reader: TagReader) -> dict[str, pa.Array]:
    """list<string> columns of the words of each of TEXT_CATEGORIES, as `TagReader.text_parts` has them post by post."""
    parts: dict[str, pa.Array] = {}
    for category in TAG_CATEGORIES:
        column = columns[category]
        post_T, word_T, words = _read(column, category, reader)
        if category == "general":
            special_T = np.array([reader.is_special(name) for name in words], bool)[word_T]
            parts["special"] = _lists(post_T[special_T], word_T[special_T], words, column.posts)
            post_T, word_T = post_T[~special_T], word_T[~special_T]
        parts[category] = _lists(post_T, word_T, words, column.posts)
    return {category: parts[category] for category in TEXT_CATEGORIES}


def _read(column: TagColumn, category: str, reader: TagReader) -> tuple[Numbers, Numbers, list[str]]:
    """Post and word of each tag in the text, in order, no word twice in a post; and the words by number."""
    number: dict[str, int] = {}

    def numbers(meanings: list[tuple[str, ...]]) -> list[list[int]]:
        return [[number.setdefault(words, len(number)) for words in meaning] for meaning in meanings]

    own: list[tuple[str, ...]] = [(words,) if (words := reader.words(category, tag)) else () for tag in column.distinct]
    implied = [reader.implied(*words) if words else () for words in own]
    if reader.drops_implied:
        post_T, word_T = _spread(column, numbers(own))
        dropped = _spread(column, numbers(implied))
        post_T, word_T = _without(post_T, word_T, *dropped, len(number))
    else:
        both = [words + others for words, others in zip(own, implied, strict=True)]
        post_T, word_T = _spread(column, numbers(both))
    # Equal pairs next to each other, the first of them first.
    key_T = post_T * max(1, len(number)) + word_T
    first = np.sort(np.unique(key_T, return_index=True)[1])
    return post_T[first], word_T[first], list(number)


def _spread(column: TagColumn, meanings: list[list[int]]) -> tuple[Numbers, Numbers]:
    """Post and word of every word that the tags mean: each tag has any number of them."""
    count_D = np.fromiter(map(len, meanings), np.int64, len(meanings))
    flat = np.fromiter(chain.from_iterable(meanings), np.int64, count_D.sum())
    count_T = count_D[column.tag_T]
    start_T = (np.cumsum(count_D) - count_D)[column.tag_T]
    before_T = np.cumsum(count_T) - count_T
    word_T = flat[np.repeat(start_T - before_T, count_T) + np.arange(count_T.sum())]
    return np.repeat(column.post_T, count_T), word_T


def _without(
    post_T: Numbers, word_T: Numbers, from_posts: Numbers, dropped: Numbers, words: int
) -> tuple[Numbers, Numbers]:
    """The words but for those to be dropped from their posts."""
    kept_T = ~np.isin(post_T * words + word_T, from_posts * words + dropped)
    return post_T[kept_T], word_T[kept_T]


def _lists(post_T: Numbers, word_T: Numbers, words: list[str], posts: int) -> pa.Array:
    ends = np.cumsum(np.bincount(post_T, minlength=posts))
    names = pa.array(words, pa.string()).take(pa.array(word_T))
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), names)
