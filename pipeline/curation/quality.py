"""Popularity and date of posts -> quality, era and rating words. Pure functions over Arrow columns.

How popular a post becomes depends on its site, its rating and its year. Quality words are therefore percentiles of the
favourites (on Pixiv: bookmarks) within a cell of (source, rating, year). The borders between the words are computed
once, saved with the selection, and applied to later posts as well.

Axes: N posts, C cells, V distinct popularities, Q percentiles.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Cell = tuple[str, str | None, int | None]  # source, rating (None: all of them), year (None: all of them)

POST_COLUMNS: Final = ["source", "rating", "favourites", "created_at"]
_POSTS_AT_ONCE: Final = 1 << 20


@dataclass(frozen=True)
class Preset:
    """A post strictly above a percentile gets the word of the highest such percentile, else the last word."""

    percentiles: tuple[int, ...]  # whole percents, highest first
    words: tuple[str, ...]  # one more than percentiles


_SEVEN = (
    "masterpiece", "best quality", "great quality", "good quality", "normal quality", "low quality", "worst quality",
)  # fmt: skip

# kohaku: the Kohaku XL models, which HDM follows: above P90 masterpiece, P75 best, P60 great, P45 good, P30 normal, P10
# low quality, else worst. animagine31: model card of Animagine XL 3.1, the same words at P95, P85, P75, P50, P25, P10.
# noobai: NoobAI-XL has five words: above P95 masterpiece, P85 best, P60 good, P30 normal quality, else worst. Its
# discount for the age of a post is left out because percentiles within each year have the same effect.
PRESETS: Final = {
    "kohaku": Preset((90, 75, 60, 45, 30, 10), _SEVEN),
    "animagine31": Preset((95, 85, 75, 50, 25, 10), _SEVEN),
    "noobai": Preset(
        (95, 85, 60, 30), ("masterpiece", "best quality", "good quality", "normal quality", "worst quality")
    ),
}

RATING_WORDS: Final = {
    "general": "safe", "sensitive": "sensitive", "questionable": "nsfw", "explicit": "explicit, nsfw",
}  # fmt: skip

# First year of each era of the Kohaku models. Earlier posts and posts without a date get no word.
_ERAS: Final = ((2005, "old"), (2011, "early"), (2015, "mid"), (2018, "recent"), (2021, "newest"))
ERA_WORDS: Final = tuple(word for _, word in _ERAS)


@dataclass(frozen=True, kw_only=True)
class QualityTable:
    """The borders between quality words, by cell.

    A post is compared with the narrowest cell in the table: its (source, rating, year), else its (source, rating) over
    all years, else its whole source.
    """

    words: tuple[str, ...]  # best first
    borders: Mapping[Cell, tuple[float, ...]]  # the popularity to exceed for each word but the last
    settled_before: np.datetime64 | None = None  # later posts are too young to be compared by votes

    def __post_init__(self) -> None:
        for cell, borders in self.borders.items():
            if len(borders) != len(self.words) - 1 or list(borders) != sorted(borders, reverse=True):
                raise ValueError(f"cell {cell} has borders {borders} between {len(self.words)} words; give "
                                 f"{len(self.words) - 1}, highest first")  # fmt: skip

    @classmethod
    def compute(cls, preset: Preset, posts: pa.Table, min_rows: int = 50, young_days: int = 90) -> Self:
        """The table of these posts (POST_COLUMNS).

        Cells with fewer than `min_rows` posts that have votes are left out, except those of a whole source. Posts of
        the last `young_days` before the newest post do not count. A percentile is a popularity that occurs: the
        smallest one that at least that percentage of the posts do not exceed.
        """
        dates = _dates(posts)
        dates = dates[~np.isnat(dates)]
        settled_before = dates.max() - np.timedelta64(young_days, "D") if dates.size else None
        borders: dict[Cell, tuple[float, ...]] = {}
        votes = _votes(posts, settled_before)
        for known, needed in ((1, 1), (2, min_rows), (3, min_rows)):  # source; and rating; and year
            pools: dict[Cell, list[NDArray[np.int64]]] = defaultdict(list)
            for cell, popularity_2V in votes:
                if None not in cell[:known]:
                    source, rating, year = cell
                    pools[source, rating if known > 1 else None, year if known > 2 else None].append(popularity_2V)
            for pool, parts in pools.items():
                popularity_V, count_V = np.concatenate(parts, axis=1)
                lowest_first = np.argsort(popularity_V)
                ends_V = np.cumsum(count_V[lowest_first])
                if ends_V[-1] >= needed:
                    places = -(-ends_V[-1] * np.array(preset.percentiles) // 100)  # rounded up, in integers
                    at = lowest_first[np.searchsorted(ends_V, places)]
                    borders[pool] = tuple(popularity_V[at].astype(float).tolist())
        return cls(words=preset.words, borders=borders, settled_before=settled_before)

    def cell_of(self, source: str, rating: str | None, year: int | None) -> Cell | None:
        """The narrowest cell that contains such a post, or None."""
        narrowest_first = (source, rating, year), (source, rating, None), (source, None, None)
        return next((cell for cell in narrowest_first if cell in self.borders), None)

    def words_of(self, posts: pa.Table) -> list[str | None]:
        """A quality word per post (POST_COLUMNS).

        None if the post is too young, has no votes, or comes from a source without a cell.
        """
        cells, cell_N = _cells(posts)
        borders_of = [self.borders.get(self.cell_of(*cell) or cell) for cell in cells]
        unknown = (np.nan,) * (len(self.words) - 1)
        borders_CQ = np.array([borders or unknown for borders in borders_of]).reshape(len(cells), len(unknown))
        rank_N = (_popularity(posts)[:, None] <= borders_CQ[cell_N]).sum(axis=1)
        known_C = np.array([borders is not None for borders in borders_of], bool)
        rank_N[~(known_C[cell_N] & _has_votes(posts, self.settled_before))] = len(self.words)
        words: list[str | None] = np.array([*self.words, None], object)[rank_N].tolist()
        return words

    def to_json(self) -> str:
        cells = [
            {"source": source, "rating": rating, "year": year, "borders": borders}
            for (source, rating, year), borders in self.borders.items()
        ]
        settled_before = None if self.settled_before is None else str(self.settled_before)
        return json.dumps({"words": self.words, "settled_before": settled_before, "cells": cells}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        table = json.loads(text)
        borders = {(cell["source"], cell["rating"], cell["year"]): tuple(cell["borders"]) for cell in table["cells"]}
        settled_before = table["settled_before"] and np.datetime64(table["settled_before"])
        return cls(words=tuple(table["words"]), borders=borders, settled_before=settled_before)


def era_words(created_at: NDArray[np.datetime64]) -> list[str | None]:
    """The era in which each picture was posted, or None."""
    words = np.array([None, *ERA_WORDS], object)
    eras: list[str | None] = words[np.digitize(_years(created_at), [year for year, _ in _ERAS])].tolist()
    return eras


def posts_of(images: pa.Table) -> pa.Table:
    """The columns POST_COLUMNS, with dictionary-encoded texts: the posts of a whole dataset have to fit in memory."""
    columns = {name: images[name] for name in POST_COLUMNS}
    return pa.table(columns | {name: columns[name].dictionary_encode() for name in ("source", "rating")})


def _popularity(posts: pa.Table) -> NDArray[np.float64]:
    """Favourites or bookmarks, NaN if unknown."""
    popularity: NDArray[np.float64] = posts["favourites"].cast(pa.float64()).to_numpy()
    return popularity


def _votes(posts: pa.Table, settled_before: np.datetime64 | None) -> list[tuple[Cell, NDArray[np.int64]]]:
    """By cell, sorted: the popularities of posts with votes and the number of posts with each, (2, V).

    Counts a part of the posts at a time: as columns of 64 bits all of them would take gigabytes.
    """
    numbers: dict[Cell, int] = {}
    found = [np.zeros((2, 0), np.int64)]
    for start in range(0, len(posts), _POSTS_AT_ONCE):
        part = posts.slice(start, _POSTS_AT_ONCE)
        cells, cell_N = _cells(part)
        number_C = np.array([numbers.setdefault(cell, len(numbers)) for cell in cells])
        voted_N = _has_votes(part, settled_before)
        popularity_N = part["favourites"].fill_null(0).to_numpy().astype(np.int64)[voted_N]
        key_N = number_C[cell_N[voted_N]] << 32 | popularity_N + (1 << 31)
        found.append(np.stack(np.unique(key_N, return_counts=True)))
    key_V, count_V = np.concatenate(found, axis=1)
    key_V, at = np.unique(key_V, return_inverse=True)
    count_V = np.bincount(at, count_V, len(key_V)).astype(np.int64)
    votes_2V = np.stack([(key_V & (1 << 32) - 1) - (1 << 31), count_V])
    bounds = np.searchsorted(key_V >> 32, np.arange(len(numbers) + 1))
    by_cell = [(cell, votes_2V[:, bounds[number] : bounds[number + 1]]) for cell, number in numbers.items()]
    return sorted((each for each in by_cell if each[1].size), key=lambda each: _sort_key(each[0]))


def _sort_key(cell: Cell) -> tuple[str, str, int]:
    source, rating, year = cell
    return source, rating or "", year or 0


def _dates(posts: pa.Table) -> NDArray[np.datetime64]:
    dates: NDArray[np.datetime64] = posts["created_at"].to_numpy()
    return dates


def _has_votes(posts: pa.Table, settled_before: np.datetime64 | None) -> NDArray[np.bool_]:
    voted: NDArray[np.bool_] = ~np.isnan(_popularity(posts))
    return voted if settled_before is None else voted & ~(_dates(posts) >= settled_before)


def _cells(posts: pa.Table) -> tuple[list[Cell], NDArray[np.int32]]:
    """The distinct (source, rating, year), sorted, and the number of the cell of each post, (N,)."""
    (source_N, sources), (rating_N, ratings) = _codes(posts["source"]), _codes(posts["rating"])
    key_N = (source_N * (len(ratings) + 1) + rating_N + 1) * 10_000 + _years(_dates(posts)) + 1
    encoded = pa.array(key_N).dictionary_encode()
    keys = encoded.dictionary.to_numpy()
    order = np.argsort(keys)
    names, cells = [None, *ratings], []
    for key in keys[order].tolist():
        source, rating = divmod(key // 10_000, len(names))
        cells.append((sources[source], names[rating], max(0, key % 10_000 - 1) or None))
    return cells, np.argsort(order)[encoded.indices.to_numpy()]


def _codes(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """The codes, -1 for null, and the texts of a dictionary-encoded column."""
    encoded = column.unify_dictionaries().combine_chunks()
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _years(created_at: NDArray[np.datetime64]) -> NDArray[np.int64]:
    """The years (UTC), -1 for NaT."""
    years = created_at.astype("datetime64[Y]").astype(np.int64) + 1970
    return np.where(np.isnat(created_at), -1, years)
