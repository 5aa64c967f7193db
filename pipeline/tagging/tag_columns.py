"""`tags.TagReader` applied to a column of posts at once: each distinct tag is read once, the rest is array arithmetic.

Axes: N posts, T tags of all posts in sequence, D distinct tags.
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
from pipeline.tagging.tags import SEPARATORS, TagReader, remove_separators

Numbers = NDArray[np.int64]

# Matches every text that remove_separators changes, and every text with a character outside ASCII.
_SUSPECT = "|".join(["[^!-~ ]", "  ", "^ ", " $", *map(re.escape, SEPARATORS)])


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
        return cls(post_T, tags.indices.to_numpy().astype(np.int64), tags.dictionary.to_pylist(), len(lists))


def first_excluded(columns: Mapping[str, TagColumn], reader: TagReader) -> dict[int, str]:
    """For each excluded post, the first tag that excludes it, as words, in the order of TAG_CATEGORIES."""
    found: dict[int, str] = {}
    for category in TAG_CATEGORIES:
        column = columns[category]
        names = list(map(reader.excluded, column.distinct))
        flagged_D = np.array([bool(name) for name in names], bool)
        for at in np.flatnonzero(flagged_D[column.tag_T]).tolist():
            found.setdefault(int(column.post_T[at]), names[column.tag_T[at]])
    return found


def text_columns(columns: Mapping[str, TagColumn], reader: TagReader) -> dict[str, pa.Array]:
    """A list<string> column for each of TEXT_CATEGORIES, equal to `TagReader.text_parts` of each post."""
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


def remove_caption_separators(captions: pa.ChunkedArray) -> pa.Array:
    """`tags.remove_separators` of each caption. It changes few, and only those are touched."""
    texts = captions.combine_chunks()
    suspect_N = pc.match_substring_regex(texts, _SUSPECT).fill_null(False)
    changed = [remove_separators(text) for text in texts.filter(suspect_N).to_pylist()]
    return pc.replace_with_mask(texts, suspect_N, pa.array(changed, pa.string()))


def _read(column: TagColumn, category: str, reader: TagReader) -> tuple[Numbers, Numbers, pa.StringArray]:
    """Post and word number of each tag in the text, in order, without repeated words in a post; and the words."""
    meanings = [reader.meaning(category, tag) for tag in column.distinct]
    words = pa.array(list(chain.from_iterable(meanings)), pa.string()).unique()
    number = {name: at for at, name in enumerate(words.to_pylist())}
    numbers_D = [[number[name] for name in meaning] for meaning in meanings]
    if reader.drops_implied:
        post_T, word_T = _expand(column, [numbers[:1] for numbers in numbers_D])
        from_post, dropped = _expand(column, [numbers[1:] for numbers in numbers_D])
        kept_T = ~np.isin(post_T * len(words) + word_T, from_post * len(words) + dropped)
        post_T, word_T = post_T[kept_T], word_T[kept_T]
    else:
        post_T, word_T = _expand(column, numbers_D)
    first_T = np.zeros(len(post_T), bool)
    first_T[np.unique(post_T * len(words) + word_T, return_index=True)[1]] = True
    return post_T[first_T], word_T[first_T], words


def _expand(column: TagColumn, numbers_D: list[list[int]]) -> tuple[Numbers, Numbers]:
    """Post and word number of every word of every tag, given the word numbers of each distinct tag."""
    lists_T = pa.array(numbers_D, pa.list_(pa.int64())).take(pa.array(column.tag_T))
    return column.post_T[pc.list_parent_indices(lists_T).to_numpy()], lists_T.flatten().to_numpy()


def _lists(post_T: Numbers, word_T: Numbers, words: pa.StringArray, posts: int) -> pa.Array:
    ends = np.cumsum(np.bincount(post_T, minlength=posts))
    names = words.take(pa.array(word_T))
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), names)
