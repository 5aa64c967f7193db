"""`tags.TagReader` over a column of posts at once: each distinct tag is read once, the rest is arithmetic on numbers.

Axes: N posts, T tags of all posts one after the other, D distinct tags, M the words of their meanings one after the
other.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.records import TAG_CATEGORIES, TEXT_CATEGORIES
from pipeline.tagging.tags import SEPARATORS, TagReader, without_separators

Numbers = NDArray[np.int64]

# Found in every text that without_separators changes, and wherever a character is not of ASCII.
_SUSPECT = "|".join(["[^!-~ ]", "  ", "^ ", " $", *map(re.escape, SEPARATORS)])


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
        names = list(map(reader.excluded, column.distinct))
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
            special_T = np.array([reader.is_special(name) for name in words.to_pylist()], bool)[word_T]
            parts["special"] = _lists(post_T[special_T], word_T[special_T], words, column.posts)
            post_T, word_T = post_T[~special_T], word_T[~special_T]
        parts[category] = _lists(post_T, word_T, words, column.posts)
    return {category: parts[category] for category in TEXT_CATEGORIES}


def captions_without_separators(captions: pa.ChunkedArray) -> pa.Array:
    """Each as `tags.without_separators` has it, which leaves nearly all as they are: those are not touched."""
    texts = captions.combine_chunks()
    suspect_N = pc.match_substring_regex(texts, _SUSPECT).fill_null(False)
    mended = [without_separators(text) for text in texts.filter(suspect_N).to_pylist()]
    return pc.replace_with_mask(texts, suspect_N, pa.array(mended, pa.string()))


def _read(column: TagColumn, category: str, reader: TagReader) -> tuple[Numbers, Numbers, pa.StringArray]:
    """Post and word of each tag in the text, in order, no word twice in a post; and the words by number."""
    meanings = [reader.meaning(category, tag) for tag in column.distinct]
    count_D = np.fromiter(map(len, meanings), np.int64, len(meanings))
    words = pa.array(list(chain.from_iterable(meanings)), pa.string()).dictionary_encode()
    number_M = words.indices.to_numpy().astype(np.int64)
    start_D = np.cumsum(count_D) - count_D
    if reader.drops_implied:
        own_D = np.minimum(count_D, 1)
        post_T, word_T = _spread(column, number_M, start_D, own_D)
        dropped = _spread(column, number_M, start_D + own_D, count_D - own_D)
        post_T, word_T = _without(post_T, word_T, *dropped, len(words.dictionary))
    else:
        post_T, word_T = _spread(column, number_M, start_D, count_D)
    # Equal pairs next to each other, the first of them first.
    key_T = post_T * max(1, len(words.dictionary)) + word_T
    order_T = np.argsort(key_T, kind="stable")
    again = key_T[order_T[1:]] == key_T[order_T[:-1]]
    first_T = np.ones(len(key_T), bool)
    first_T[order_T[1:][again]] = False
    return post_T[first_T], word_T[first_T], words.dictionary


def _spread(column: TagColumn, number_M: Numbers, start_D: Numbers, count_D: Numbers) -> tuple[Numbers, Numbers]:
    """Post and word of every word that the tags mean: each tag has any number of them, one after the other in M."""
    count_T = count_D[column.tag_T]
    before_T = np.cumsum(count_T) - count_T
    word_T = number_M[np.repeat(start_D[column.tag_T] - before_T, count_T) + np.arange(count_T.sum())]
    return np.repeat(column.post_T, count_T), word_T


def _without(
    post_T: Numbers, word_T: Numbers, from_posts: Numbers, dropped: Numbers, words: int
) -> tuple[Numbers, Numbers]:
    """The words but for those to be dropped from their posts."""
    kept_T = ~np.isin(post_T * words + word_T, from_posts * words + dropped)
    return post_T[kept_T], word_T[kept_T]


def _lists(post_T: Numbers, word_T: Numbers, words: pa.StringArray, posts: int) -> pa.Array:
    ends = np.cumsum(np.bincount(post_T, minlength=posts))
    names = words.take(pa.array(word_T))
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), names)
