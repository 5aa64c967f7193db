import numpy as np
import pyarrow as pa
import pytest

from pipeline.curation.quality import PRESETS, Preset, QualityTable, era_words, posts_of

HALVES = Preset((50,), ("good", "bad"))
NEVER, SUMMER_2015 = np.datetime64("NaT", "s"), np.datetime64("2015-06-01", "s")
# The table published with the Kohaku XL models: Danbooru's favourites in 2024, all years together.
KOHAKU_PUBLISHED = QualityTable(
    words=PRESETS["kohaku"].words,
    borders={
        ("danbooru", "general", None): (27, 16, 10, 7, 4, 1),
        ("danbooru", "sensitive", None): (56, 30, 19, 13, 8, 2),
        ("danbooru", "questionable", None): (132, 75, 49, 33, 21, 8),
        ("danbooru", "explicit", None): (190, 106, 69, 45, 27, 9),
    },
)


def day(text: str) -> np.datetime64:
    return np.datetime64(text, "s")


def posts(
    popularity: list[float],
    source: str = "danbooru",
    rating: str | None = "general",
    created_at: np.datetime64 = SUMMER_2015,
) -> pa.Table:
    """Posts that differ only in popularity, where NaN stands for unknown."""
    count = len(popularity)
    columns = {
        "source": pa.array([source] * count, pa.string()),
        "rating": pa.array([rating] * count, pa.string()),
        "favourites": pa.array(np.array(popularity, float), from_pandas=True),
        "created_at": pa.array(np.full(count, created_at)),
    }
    return posts_of(pa.table(columns))


def word_of(
    table: QualityTable, source: str, rating: str | None, created_at: np.datetime64, popularity: float
) -> str | None:
    return table.words_of(posts([popularity], source, rating, created_at))[0]


def together(*parts: pa.Table) -> pa.Table:
    return pa.concat_tables(parts)


def later() -> pa.Table:
    """A post so late that the others are old enough to have votes."""
    return posts([1.0], source="elsewhere", created_at=day("2030-06-01"))


@pytest.mark.parametrize(
    ("rating", "favourites", "word"),
    [
        ("general", 28, "masterpiece"),
        ("general", 27, "best quality"),
        ("general", 16, "great quality"),
        ("general", 10, "good quality"),
        ("general", 7, "normal quality"),
        ("general", 4, "low quality"),
        ("general", 2, "low quality"),
        ("general", 1, "worst quality"),
        ("general", 0, "worst quality"),
        ("sensitive", 56, "best quality"),
        ("sensitive", 57, "masterpiece"),
        ("questionable", 132, "best quality"),
        ("explicit", 191, "masterpiece"),
        ("explicit", 9, "worst quality"),
        ("explicit", 10, "low quality"),
    ],
)
def test_a_word_needs_more_favourites_than_its_border(rating: str, favourites: int, word: str) -> None:
    assert word_of(KOHAKU_PUBLISHED, "danbooru", rating, day("2012-01-01"), favourites) == word


def test_the_published_table_has_no_words_for_other_sites_or_unknown_ratings() -> None:
    assert word_of(KOHAKU_PUBLISHED, "pixiv", "general", day("2012-01-01"), 1000) is None
    assert word_of(KOHAKU_PUBLISHED, "danbooru", None, day("2012-01-01"), 1000) is None


def test_percentiles_split_a_hundred_posts_exactly() -> None:
    """100 different popularities: exactly 10 are above the 90th percentile, 15 between it and the 75th, and so on."""
    popularity = np.random.default_rng(0).permutation(100).astype(float).tolist()
    for name, counts in {
        "kohaku": [10, 15, 15, 15, 15, 20, 10],
        "animagine31": [5, 10, 10, 25, 25, 15, 10],
        "noobai": [5, 10, 25, 30, 30],
    }.items():
        sample = posts(popularity)
        words = QualityTable.compute(PRESETS[name], together(sample, later())).words_of(sample)
        assert [words.count(word) for word in PRESETS[name].words] == counts
        ranked = [word for _, word in sorted(zip(popularity, words, strict=True), reverse=True)]
        assert ranked == [word for word, count in zip(PRESETS[name].words, counts, strict=True) for _ in range(count)]


def test_borders_equal_numpys_inverted_cdf_percentiles() -> None:
    rng = np.random.default_rng(1)
    for count in (50, 51, 77, 1000):
        popularity = np.floor(rng.lognormal(2, 1.5, count))
        table = QualityTable.compute(PRESETS["kohaku"], together(posts(popularity.tolist()), later()))
        expected = np.percentile(popularity, PRESETS["kohaku"].percentiles, method="inverted_cdf")
        assert table.borders["danbooru", "general", 2015] == tuple(expected)


def test_equal_posts_have_equal_words() -> None:
    sample = posts([0.0] * 99 + [1.0])
    words = QualityTable.compute(PRESETS["kohaku"], together(sample, later())).words_of(sample)
    assert words == ["worst quality"] * 99 + ["masterpiece"]


def test_posts_are_compared_within_their_year_and_rating() -> None:
    low = posts(list(range(100)), created_at=day("2010-06-01"))
    high = posts(list(range(1000, 1100)), created_at=day("2020-06-01"))
    other = posts(list(range(50, 150)), rating="explicit", created_at=day("2010-06-01"))
    table = QualityTable.compute(HALVES, together(low, high, other, later()))
    for part in (low, high, other):
        assert table.words_of(part) == ["bad"] * 50 + ["good"] * 50
    assert table.borders["danbooru", "general", None] == (99.0,)
    assert table.borders["danbooru", None, None] == (sorted([*range(100), *range(1000, 1100), *range(50, 150)])[149],)


def test_small_cells_are_pooled() -> None:
    few = posts([1000.0] * 49, created_at=day("2010-06-01"))
    many = posts([float(number) for number in range(100)], created_at=day("2011-06-01"))
    rare = posts([5.0] * 49, rating="explicit", created_at=day("2011-06-01"))
    table = QualityTable.compute(HALVES, together(few, many, rare, later()), min_rows=50)
    assert {cell for cell in table.borders if cell[0] == "danbooru"} == {
        ("danbooru", None, None),
        ("danbooru", "general", None),
        ("danbooru", "general", 2011),
    }
    assert word_of(table, "danbooru", "general", day("2010-01-01"), 75) == "good"  # all years: above 74
    assert word_of(table, "danbooru", "general", day("2010-01-01"), 74) == "bad"
    assert word_of(table, "danbooru", "general", day("2011-01-01"), 50) == "good"  # 2011 alone: above 49
    whole_site = sorted([1000.0] * 49 + list(range(100)) + [5.0] * 49)[98]
    assert word_of(table, "danbooru", "explicit", day("2011-01-01"), whole_site) == "bad"
    assert word_of(table, "danbooru", "explicit", day("2011-01-01"), whole_site + 1) == "good"


def test_a_small_source_still_has_a_cell() -> None:
    table = QualityTable.compute(HALVES, together(posts([1.0, 2.0, 3.0], source="pixiv"), later()))
    assert [cell for cell in table.borders if cell[0] == "pixiv"] == [("pixiv", None, None)]
    assert word_of(table, "pixiv", "general", day("2015-01-01"), 3) == "good"


def test_later_posts_get_words_from_the_same_table() -> None:
    table = QualityTable.compute(HALVES, together(posts([float(number) for number in range(100)]), later()))
    for rating, date in (
        ("general", day("2016-01-01")),
        ("general", NEVER),
        ("unheard of", day("2015-06-01")),
        (None, NEVER),
    ):
        assert word_of(table, "danbooru", rating, date, 50) == "good"
        assert word_of(table, "danbooru", rating, date, 49) == "bad"
    assert word_of(table, "elsewhere else", "general", day("2015-06-01"), 50) is None


def test_young_posts_and_posts_without_votes_get_no_word_and_do_not_count() -> None:
    old = posts([float(number) for number in range(100)], created_at=day("2015-06-01"))
    young = posts([0.0] * 1000, created_at=day("2020-11-01"))
    newest = posts([0.0], created_at=day("2021-01-01"))
    unvoted = posts([float("nan")] * 1000)
    table = QualityTable.compute(HALVES, together(old, young, newest, unvoted), young_days=90)
    assert table.borders["danbooru", "general", 2015] == (49.0,)
    assert table.borders["danbooru", None, None] == (49.0,)
    assert table.settled_before == day("2020-10-03")
    assert set(table.words_of(young)) == set(table.words_of(unvoted)) == {None}
    assert word_of(table, "danbooru", "general", day("2020-10-02T23:59:59"), 50) == "good"
    assert word_of(table, "danbooru", "general", day("2020-10-03"), 50) is None


def test_a_table_is_equal_after_a_round_trip_through_json() -> None:
    rng = np.random.default_rng(0)
    sample = together(*[posts(rng.integers(0, 99, 60).tolist(), "pixiv", rating, day(f"{year}-06-01"))
                        for rating in (None, "general") for year in (2012, 2013)])  # fmt: skip
    for table in (QualityTable.compute(PRESETS["noobai"], sample), KOHAKU_PUBLISHED):
        assert QualityTable.from_json(table.to_json()) == table
        assert QualityTable.from_json(table.to_json()).words_of(sample) == table.words_of(sample)


def test_a_table_of_no_posts_gives_no_words() -> None:
    table = QualityTable.compute(HALVES, posts([]))
    assert table.borders == {}
    assert table.words_of(posts([])) == []
    assert table.words_of(posts([1.0])) == [None]


def test_a_table_with_too_few_borders_is_refused() -> None:
    with pytest.raises(ValueError, match="give 1"):
        QualityTable(words=("good", "bad"), borders={("danbooru", None, None): (3.0, 1.0)})
    with pytest.raises(ValueError, match="highest first"):
        QualityTable(words=("good", "fair", "bad"), borders={("danbooru", None, None): (1.0, 3.0)})


def test_eras_begin_in_their_years() -> None:
    expected = {
        2004: None, 2005: "old", 2010: "old", 2011: "early", 2014: "early", 2015: "mid", 2017: "mid", 2018: "recent",
        2020: "recent", 2021: "newest", 2024: "newest", 2031: "newest",
    }  # fmt: skip
    for year, word in expected.items():
        assert era_words(np.array([day(f"{year}-01-01T00:00:00"), day(f"{year}-12-31T23:59:59")])) == [word, word]
    assert era_words(np.array([NEVER])) == [None]
