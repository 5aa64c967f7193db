"""Numbers and dates of a post -> quality, era and rating words. Pure: numpy in, words out.

How popular a post can become depends on the site, its rating and its year, so each is judged among its like: a
percentile of the favourites (Pixiv: bookmarks) per cell of (source, rating, year). The table of these borders is
computed once, saved with the selection, and judges later posts too.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

Cell = tuple[str, str | None, int | None]  # source, rating or all of them, year or all of them


@dataclass(frozen=True)
class Preset:
    """A post above a percentile, not at it, gets the percentile's word; one that is above none gets the last word."""

    percentiles: tuple[int, ...]  # whole percents, highest first
    words: tuple[str, ...]  # one more than percentiles


_SEVEN = (
    "masterpiece", "best quality", "great quality", "good quality", "normal quality", "low quality", "worst quality",
)  # fmt: skip

# kohaku: the Kohaku XL models, which HDM follows: above P90 masterpiece, P75 best, P60 great, P45 good, P30 normal, P10
# low quality, else worst. animagine31: Animagine XL 3.1's model card, the same words at P95, P85, P75, P50, P25, P10.
# noobai: NoobAI-XL's, five words: above P95 masterpiece, P85 best, P60 good, P30 normal quality, else worst. Its own
# discount for age is left out: percentiles within each year, as all our presets have, do what it is for.
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

# kohaku's eras begin in these years; what is older than the first, or of no known date, has no word.
_ERAS: Final = ((2005, "old"), (2011, "early"), (2015, "mid"), (2018, "recent"), (2021, "newest"))
ERA_WORDS: Final = tuple(word for _, word in _ERAS)


@dataclass(frozen=True)
class Names:
    """A column of few distinct texts. Numbers, so that those of ten million rows are small."""

    code_N: NDArray[np.int32]  # in `distinct`, -1 for none
    distinct: list[str]  # in the order in which they come

    @classmethod
    def of(cls, names: Iterable[str | None]) -> Self:
        places: dict[str, int] = {}
        codes = [-1 if name is None else places.setdefault(name, len(places)) for name in names]
        return cls(np.array(codes, np.int32), list(places))

    @classmethod
    def together(cls, parts: Sequence["Names"]) -> Self:
        """One after the other."""
        places: dict[str, int] = {}
        codes = []
        for part in parts:
            place_D = [places.setdefault(name, len(places)) for name in part.distinct]
            codes.append(np.array([*place_D, -1], np.int32)[part.code_N])
        return cls(np.concatenate(codes), list(places))

    def texts(self) -> list[str | None]:
        """One object each, not one a row."""
        texts: list[str | None] = np.array([*self.distinct, None], object)[self.code_N].tolist()
        return texts


@dataclass(frozen=True, kw_only=True)
class Posts:
    """Columns of equal length, one row a post."""

    source: Names
    rating: Names
    created_at: NDArray[np.datetime64]  # NaT where unknown
    popularity: NDArray[np.float64]  # favourites or bookmarks, NaN where the source has none

    def __post_init__(self) -> None:
        lengths = set(map(len, (self.source.code_N, self.rating.code_N, self.created_at, self.popularity)))
        assert len(lengths) == 1, lengths

    @classmethod
    def together(cls, parts: Sequence["Posts"]) -> Self:
        """One after the other."""
        return cls(
            source=Names.together([part.source for part in parts]),
            rating=Names.together([part.rating for part in parts]),
            created_at=np.concatenate([part.created_at for part in parts]),
            popularity=np.concatenate([part.popularity for part in parts]),
        )

    def cell(self, source: int, rating: int, year: int) -> Cell:
        """Of numbers as in _cells."""
        return self.source.distinct[source], None if rating < 0 else self.rating.distinct[rating], max(0, year) or None


@dataclass(frozen=True, kw_only=True)
class QualityTable:
    """The borders between quality words. A post is judged by the narrowest cell that is there: its (source, rating,
    year), else all years, else all ratings of its source."""

    words: tuple[str, ...]  # best first
    borders: Mapping[Cell, tuple[float, ...]]  # the popularity to exceed for each word but the last
    settled_before: np.datetime64 | None = None  # posts from this moment on are too young to have votes

    def __post_init__(self) -> None:
        for cell, borders in self.borders.items():
            if len(borders) != len(self.words) - 1 or list(borders) != sorted(borders, reverse=True):
                raise ValueError(f"cell {cell} has borders {borders} between {len(self.words)} words; give "
                                 f"{len(self.words) - 1}, highest first")  # fmt: skip

    @classmethod
    def compute(cls, preset: Preset, posts: Posts, min_rows: int = 50, young_days: int = 90) -> Self:
        """The table of the posts at hand. A cell of fewer than `min_rows` posts with votes is left out, but that of a
        whole source never. Too young is what came in the `young_days` before the newest post.

        A percentile is a popularity that occurs: the smallest that at least so many percent of the posts do not exceed.
        """
        dates = posts.created_at[~np.isnat(posts.created_at)]
        settled_before = dates.max() - np.timedelta64(young_days, "D") if dates.size else None
        voted = _has_votes(posts, settled_before)
        lowest_first = np.flatnonzero(voted)[np.argsort(posts.popularity[voted])]
        cells_C3, cell_N = _distinct(_cells(posts)[lowest_first])
        popularity_N = posts.popularity[lowest_first]
        borders: dict[Cell, tuple[float, ...]] = {}
        for known, needed in ((1, 1), (2, min_rows), (3, min_rows)):  # source; and rating; and year
            pools_P3, pool_C = _distinct(np.where(np.arange(3) < known, cells_C3, -1))
            counts, percentiles = _percentiles(pool_C[cell_N], popularity_N, preset)
            for pool, count, found in zip(pools_P3.tolist(), counts, percentiles, strict=True):
                if count >= needed and -1 not in pool[:known]:
                    borders[posts.cell(*pool)] = tuple(found)
        return cls(words=preset.words, borders=borders, settled_before=settled_before)

    def cell_of(self, source: str, rating: str | None, year: int | None) -> Cell | None:
        """The narrowest cell that judges such a post; None where there is none."""
        narrowest_first = (source, rating, year), (source, rating, None), (source, None, None)
        return next((cell for cell in narrowest_first if cell in self.borders), None)

    def judge(self, posts: Posts) -> list[str | None]:
        """A quality word for each post; None for one too young, without votes, or of a source without a cell."""
        cells_C3, cell_N = _distinct(_cells(posts))
        borders_CP = np.zeros((len(cells_C3), len(self.words) - 1))
        known_C = np.zeros(len(cells_C3), bool)
        for at, numbers in enumerate(cells_C3.tolist()):
            cell = self.cell_of(*posts.cell(*numbers))
            if cell is not None:
                borders_CP[at], known_C[at] = self.borders[cell], True
        rank_N = (posts.popularity[:, None] <= borders_CP[cell_N]).sum(axis=1)
        rank_N[~(known_C[cell_N] & _has_votes(posts, self.settled_before))] = len(self.words)
        judged: list[str | None] = np.array([*self.words, None], object)[rank_N].tolist()
        return judged

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
    """When a picture was posted, in a word."""
    words = np.array([None, *(word for _, word in _ERAS)], object)
    judged: list[str | None] = words[np.digitize(_years(created_at), [year for year, _ in _ERAS])].tolist()
    return judged


def _has_votes(posts: Posts, settled_before: np.datetime64 | None) -> NDArray[np.bool_]:
    voted: NDArray[np.bool_] = ~np.isnan(posts.popularity)
    return voted if settled_before is None else voted & ~(posts.created_at >= settled_before)


def _cells(posts: Posts) -> NDArray[np.int32]:
    """(source, rating, year) of each post as numbers, (N, 3), -1 for unknown."""
    return np.stack([posts.source.code_N, posts.rating.code_N, _years(posts.created_at)], axis=1, dtype=np.int32)


def _years(created_at: NDArray[np.datetime64]) -> NDArray[np.int64]:
    """The years (UTC), -1 for NaT."""
    years = created_at.astype("datetime64[Y]").astype(np.int64) + 1970
    return np.where(np.isnat(created_at), -1, years)


def _distinct(cells_N3: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The distinct cells, (C, 3), and which of them each row is, (N,)."""
    if not len(cells_N3):
        return cells_N3, np.zeros(0, np.int64)
    # One number a cell: sorting numbers is ten times as fast as sorting rows, and short numbers again.
    spans = cells_N3.max(axis=0) + 2
    number_N = np.ravel_multi_index(tuple((cells_N3 + 1).T), tuple(spans))
    _, first, cell_N = np.unique(_short(number_N), return_index=True, return_inverse=True)
    return cells_N3[first], cell_N


def _short(number_N: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
    """The same, none of which is negative, in the fewest bytes: numpy sorts those of two in one pass."""
    return number_N.astype(np.min_scalar_type(number_N.max(initial=0)))


def _percentiles(
    pool_N: NDArray[np.int64], popularity_N: NDArray[np.float64], preset: Preset
) -> tuple[list[int], list[list[float]]]:
    """Of each pool, which are numbered from 0: its number of posts and their percentiles. Popularity is ascending."""
    counts_P = np.bincount(pool_N)
    sorted_N = popularity_N[np.argsort(_short(pool_N), kind="stable")]  # one pool after the other
    place_PQ = -(-counts_P[:, None] * np.array(preset.percentiles) // 100) - 1  # rounded up, in whole numbers
    start_P = np.cumsum(counts_P) - counts_P
    return counts_P.tolist(), sorted_N[start_P[:, None] + place_PQ].tolist()
