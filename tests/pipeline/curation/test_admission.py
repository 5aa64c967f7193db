"""Each rule refuses the rows that break it, with its reason and detail; the first rule that refuses a row counts."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.records import IMAGES
from pipeline.curation.admission import TAG_COLUMNS, checks, first_refusals, rule_columns
from pipeline.curation.quality import PRESETS, QualityTable, posts_of
from pipeline.curation.stage_rules import Rules, ScoreRange, tag_rules
from pipeline.tagging.tags import TagReader

RULES = Rules(min_side=100)
TAGS = TagReader(tag_rules(RULES))
SCHEMA = pa.schema([IMAGES.field(name) for name in rule_columns(RULES) if name != "id"])
Row = dict[str, Any]


def image(source: str = "danbooru", **changes: Any) -> Row:
    return {
        "source": source, "rating": "general", "favourites": 5, "created_at": datetime(2015, 1, 1, tzinfo=UTC),
        "width": 200, "height": 200, **{name: ["sky"] for name in TAG_COLUMNS}, **changes,
    }  # fmt: skip


def refusals(rows: list[Row], rules: Rules, **scores: list[float]) -> list[tuple[str, str] | None]:
    images = pa.Table.from_pylist(rows, SCHEMA)
    quality = QualityTable.compute(PRESETS[rules.preset], posts_of(images))
    columns = {name.replace("_", "."): np.array(values, np.float32) for name, values in scores.items()}
    return first_refusals(checks(images, columns, rules, quality, TAGS), images.num_rows)


@pytest.mark.parametrize(
    ("changes", "rules", "reason", "detail"),
    [
        ({"width": 99}, {}, "too small", "99 x 200, needs 100"),
        ({"height": 801}, {}, "too elongated", "200 x 801"),
        ({"rating": "explicit"}, {"ratings": ("general",)}, "rating", "explicit"),
        ({"rating": None}, {"ratings": ("general",)}, "rating", "None"),
        ({"tags_meta": ["cosplay_photo"]}, {}, "tag cosplay photo", ""),
        ({"tags_general": ["third-party edit"]}, {}, "tag third-party edit", ""),
        ({}, {"sources": ("pixiv",)}, "source", "danbooru"),
        ({"tags_artist": ["some_one", "c"]}, {"artists": ("d",), "artist_sources": ("danbooru",)},
         "artist not asked for", "some one, c"),
        ({}, {"quality": ("masterpiece",)}, "quality not asked for", "None"),
        ({"created_at": None}, {"eras": ("mid",)}, "era not asked for", "None"),
        ({"tags_meta": ["cosplay_photo"], "width": 5}, {}, "tag cosplay photo", ""),
    ],
)  # fmt: skip
def test_a_row_is_refused_by_the_first_rule_that_it_breaks(
    changes: Row, rules: dict[str, Any], reason: str, detail: str
) -> None:
    rows = [image(**changes), image(), image("pixiv")]
    assert refusals(rows, replace(RULES, **rules))[0] == (reason, detail)
    assert refusals(rows[1:], RULES) == [None, None]


def test_a_row_of_unknown_rating_and_a_row_at_every_limit_are_admitted() -> None:
    rows = [
        image(rating=None, width=100, height=400, tags_artist=["x"]),
        image("pixiv", tags_artist=["some_one"]),
        image("pixiv", tags_artist=["x"]),
    ]
    found = refusals(rows, replace(RULES, artists=("some one",), eras=("mid",)))
    assert found == [None, None, ("artist not asked for", "x")]


def test_scores_admit_both_ends_of_their_range_and_nothing_without_a_score() -> None:
    rules = replace(RULES, scores={"a.good": ScoreRange(min=0.5, max=0.75)})
    found = refusals([image()] * 5, rules, a_good=[0.25, 0.5, 0.75, 1.0, np.nan])
    ends = "needs at least 0.5 and at most 0.75"
    assert {row: each for row, each in enumerate(found) if each} == {
        row: ("score a.good", f"{value}, {ends}") for row, value in ((0, "0.25"), (3, "1"), (4, "none"))
    }
