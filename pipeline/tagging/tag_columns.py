"""`tags.TagReader` applied to a column of posts at once: each distinct tag is read once, the rest is array arithmetic.

Axes: N posts, T tags of all posts in sequence, D distinct tags, F words of all distinct tags in sequence.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.records import TAG_CATEGORIES, TEXT_CATEGORIES
from pipeline.tagging.tags import SEPARATORS, TagReader, remove_separators

Numbers = NDArray[np.signedinteger[Any]]

# Matches every text that remove_separators changes, and every text with a character outside ASCII.
_SUSPECT = "|".join(["[^!-~ ]", "  ", "^ ", " $", *map(re.escape, SEPARATORS)])
# Tags whose words are kept from shard to shard, some 300 bytes each: Danbooru has a million, most on one or two posts.
_KEPT_TAGS = 1 << 18
# A table of this many int32 stays in the processor's cache.
_TABLE_CELLS = 1 << 21


@dataclass(frozen=True)
class TagColumn:
    """The tags of one category."""

    post_T: Numbers  # ascending
    tag_T: Numbers  # index into `distinct`
    distinct: list[str]
    posts: int

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "TagColumn":
        """From a list<string> column without nulls."""
        lists = column.combine_chunks()
        tags = lists.flatten().dictionary_encode()
        post_T = pc.list_parent_indices(lists).to_numpy()
        return cls(post_T, tags.indices.to_numpy(), tags.dictionary.to_pylist(), len(lists))


def first_excluded(columns: Mapping[str, TagColumn], reader: TagReader) -> dict[int, str]:
    """For each excluded post, the first tag that excludes it, as words, in the order of TAG_CATEGORIES."""
    found: dict[int, str] = {}
    for category in TAG_CATEGORIES:
        column = columns[category]
        names = list(map(reader.excluded, column.distinct))
        flagged_D = np.fromiter(map(bool, names), bool, len(names))
        for at in np.flatnonzero(flagged_D[column.tag_T]).tolist() if flagged_D.any() else ():
            found.setdefault(int(column.post_T[at]), names[column.tag_T[at]])
    return found


def text_columns(columns: Mapping[str, TagColumn], reader: TagReader) -> dict[str, pa.Array]:
    """A list<string> column for each of TEXT_CATEGORIES, equal to `TagReader.text_parts` of each post."""
    parts: dict[str, pa.Array] = {}
    for category in TAG_CATEGORIES:
        column = columns[category]
        post_T, word_T, words = _read(column, category, reader)
        if category == "general":
            special_T = np.fromiter(map(reader.is_special, words), bool, len(words))[word_T]
            parts["special"] = _lists(post_T[special_T], word_T[special_T], words, column.posts)
            post_T, word_T = post_T[~special_T], word_T[~special_T]
        parts[category] = _lists(post_T, word_T, words, column.posts)
    return {category: parts[category] for category in TEXT_CATEGORIES}


def remove_caption_separators(captions: pa.ChunkedArray) -> pa.Array:
    """`tags.remove_separators` of each caption. It changes few, and only those are touched."""
    texts = captions.combine_chunks()
    suspect_N = pc.match_substring_regex(texts, _SUSPECT).fill_null(False)
    changed = [remove_separators(text) for text in texts.filter(suspect_N).to_pylist()]
    return pc.replace_with_mask(texts, suspect_N, pa.array(changed, pa.string()))


class _Vocabulary:
    """Numbers of the words that a reader makes of tags. Kept from shard to shard: asking the reader for each distinct
    tag of each shard took half of the time of a selection."""

    def __init__(self, reader: TagReader, category: str) -> None:
        self._reader, self._category = reader, category
        self._numbers: dict[str, tuple[int, ...]] = {}  # of a tag's words
        self._number: dict[str, int] = {}  # of a word
        self._words: list[str] = []

    def read(self, tags: Sequence[str]) -> tuple[Numbers, Numbers, list[str]]:
        """The number of words of each tag, (D,); the words as indices, (F,), into the third result."""
        if len(self._numbers) > _KEPT_TAGS:
            for kept in (self._numbers, self._number, self._words):
                kept.clear()
        known = self._numbers.get
        numbers_D = [self._new(tag) if (numbers := known(tag)) is None else numbers for tag in tags]
        count_D = np.fromiter(map(len, numbers_D), np.int64, len(numbers_D))
        number_F = np.fromiter(chain.from_iterable(numbers_D), np.int64, count_D.sum())
        used, word_F = np.unique(number_F, return_inverse=True)
        return count_D, word_F, [self._words[number] for number in used.tolist()]

    def _new(self, tag: str) -> tuple[int, ...]:
        words = self._reader.meaning(self._category, tag)
        for word in words:
            if word not in self._number:
                self._number[word] = len(self._words)
                self._words.append(word)
        self._numbers[tag] = tuple(self._number[word] for word in words)
        return self._numbers[tag]


_vocabulary = lru_cache(maxsize=2 * len(TAG_CATEGORIES))(_Vocabulary)


def _read(column: TagColumn, category: str, reader: TagReader) -> tuple[Numbers, Numbers, list[str]]:
    """Post and word number of each tag in the text, in order, without repeated words in a post; and the words."""
    count_D, word_F, words = _vocabulary(reader, category).read(column.distinct)
    start_D = np.cumsum(count_D) - count_D
    if reader.drops_implied:
        own_D = np.minimum(count_D, 1)
        post_T, word_T = _expand(column, start_D, own_D, word_F)
        from_post, dropped = _expand(column, start_D + own_D, count_D - own_D, word_F)
        kept_T = ~np.isin(post_T * len(words) + word_T, from_post * len(words) + dropped)
        post_T, word_T = post_T[kept_T], word_T[kept_T]
    else:
        post_T, word_T = _expand(column, start_D, count_D, word_F)
    first_T = _first_in_post(post_T, word_T, len(words))
    return post_T[first_T], word_T[first_T], words


def _expand(column: TagColumn, start_D: Numbers, count_D: Numbers, word_F: Numbers) -> tuple[Numbers, Numbers]:
    """Post and word number of every word of every tag; the words of a tag are `count` of word_F from `start` on."""
    start_T, count_T = start_D[column.tag_T], count_D[column.tag_T]
    ends_T = np.cumsum(count_T)
    total = int(ends_T[-1]) if len(ends_T) else 0
    return np.repeat(column.post_T, count_T), word_F[np.repeat(start_T - ends_T + count_T, count_T) + np.arange(total)]


def _first_in_post(post_T: Numbers, word_T: Numbers, words: int) -> NDArray[np.bool_]:
    """True where a word occurs in its post for the first time.

    Sorting took longer than all other arithmetic here. A table of (post, word) that is written backwards keeps the
    first place of each; cells from earlier posts need no clearing, because only cells just written are read.
    """
    first_T = np.empty(len(post_T), bool)
    posts_at_once = max(1, _TABLE_CELLS // max(1, words))
    table = np.empty(posts_at_once * words, np.int32)
    last = int(post_T[-1]) if len(post_T) else -1
    for start, end in pairwise(np.searchsorted(post_T, np.arange(0, last + 1 + posts_at_once, posts_at_once))):
        if start < end:
            cell = (post_T[start:end] - post_T[start]) * words + word_T[start:end]
            place = np.arange(end - start, dtype=np.int32)
            table[cell[::-1]] = place[::-1]  # of equal cells the last assignment stays
            first_T[start:end] = table[cell] == place
    return first_T


def _lists(post_T: Numbers, word_T: Numbers, words: Sequence[str], posts: int) -> pa.Array:
    ends = np.cumsum(np.bincount(post_T, minlength=posts))
    names = pa.array(words, pa.string()).take(pa.array(word_T))
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), names)
