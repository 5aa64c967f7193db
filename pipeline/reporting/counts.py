"""Counts words and tags over any number of shards in bounded memory: beyond a limit the rarest are forgotten."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

NONE = "none"  # the word for null

_WORDS_REMEMBERED = 1_000
_TAGS_REMEMBERED = 400_000
_TAGS_BUFFERED = 1_200_000  # rows of counts that are not added up yet: about 60 MB per category


def count_words(values: pa.Array | pa.ChunkedArray) -> Counter[str]:
    """How often each text occurs; null counts as NONE."""
    counted = values.value_counts()
    words, counts = counted.field("values").to_pylist(), counted.field("counts").to_pylist()
    return Counter({NONE if word is None else word: count for word, count in zip(words, counts, strict=True)})


def add_words(words: Counter[str], more: Counter[str]) -> None:
    """Adds `more` in place and keeps only the most frequent thousand words."""
    words.update(more)
    if len(words) > _WORDS_REMEMBERED:
        kept = words.most_common(_WORDS_REMEMBERED)
        words.clear()
        words.update(dict(kept))


@dataclass
class TagCounts:
    """The number of pictures with each tag, per view."""

    views: int
    forgotten: bool = False  # some rare tags are missing
    _parts: list[pa.Table] = field(default_factory=list)

    def add(self, lists: pa.Array, masks: NDArray[np.bool_]) -> None:
        """Counts the tags of a batch; `masks` (views, rows) says which rows are in which view."""
        tags = lists.flatten().dictionary_encode()
        if not len(tags):
            return
        size = len(tags.dictionary) + 1  # the last code stands for null
        codes = pc.fill_null(tags.indices, size - 1).to_numpy()
        # Counts a tag once per post. The rows ascend, which makes a stable sort 8 times as fast.
        cells = np.sort(pc.list_parent_indices(lists).to_numpy() * size + codes, kind="stable")
        rows, codes = np.divmod(cells[np.diff(cells, prepend=-1) > 0], size)
        counts = [np.bincount(codes[mask[rows]], minlength=size)[:-1] for mask in masks]
        self._parts.append(pa.table([tags.dictionary.cast(pa.string()), *counts], names=self._names))
        self._add_up(_TAGS_BUFFERED)

    def merge(self, other: "TagCounts") -> None:
        self._parts += other._parts
        self.forgotten |= other.forgotten
        self._add_up(_TAGS_BUFFERED)

    def top(self, count: int) -> tuple[list[tuple[Any, ...]], int]:
        """The `count` most frequent tags as (tag, pictures in each view ...), and the number of tags."""
        self._add_up(0)
        if not self._parts:
            return [], 0
        table = _most_frequent(self._parts[0], count)
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True)), self._parts[0].num_rows

    @property
    def _names(self) -> list[str]:
        return ["tag", *map(str, range(self.views))]

    def _add_up(self, buffered: int) -> None:
        """Adds up the parts if they have more than `buffered` rows."""
        if len(self._parts) < 2 or sum(part.num_rows for part in self._parts) <= buffered:
            return
        # A single thread keeps the order of the groups, and with it the order of equally frequent tags.
        groups = pa.concat_tables(self._parts).group_by("tag", use_threads=False)
        added = groups.aggregate([(name, "sum") for name in self._names[1:]]).rename_columns(self._names)
        if added.num_rows > _TAGS_REMEMBERED:
            self.forgotten, added = True, _most_frequent(added, _TAGS_REMEMBERED)
        self._parts = [added]


def _most_frequent(table: pa.Table, count: int) -> pa.Table:
    """The rows with the largest counts in view 0; equal ones in the order of their tags."""
    return table.take(pc.select_k_unstable(table, count, [("0", "descending"), ("tag", "ascending")]))
