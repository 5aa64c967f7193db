"""How columns are read, decided from samples: with evidence, or refused with the flag that resolves it."""

from typing import Any

import pytest

from pipeline.sources import danbooru
from pipeline.sources.reading import Profile, Reading, ReadingFlags, profile
from pipeline.sources.values import UnreadableField


def rows(count: int = 100, **columns: Any) -> list[dict[str, Any]]:
    """Rows of Danbooru. A column's list is repeated."""
    given: dict[str, Any] = {"rating": ["g", "s", "q", "e"], "created_at": ["2021-05-06"], "tags": ["1girl solo"]}
    given = given | columns
    return [{"id": i} | {name: values[i % len(values)] for name, values in given.items()} for i in range(count)]


def profiled(*flags: str, features: dict[str, Any] | None = None, **columns: Any) -> Profile:
    asked = ReadingFlags(**dict(flag.split("=") for flag in flags))  # type: ignore[arg-type]
    return profile(danbooru, rows(**columns), features or {}, {}, asked)


def uncertain(found: Profile) -> list[str]:
    return [line for line in found.lines if "UNCERTAIN" in line]


def test_a_usual_file_is_read_as_it_is_and_nothing_is_uncertain() -> None:
    found = profiled()
    assert found.reading == Reading()
    assert not found.problems
    assert not uncertain(found)
    assert "rating: g 25%, s 25%, q 25%, e 25%; s is sensitive, as since 2022" in found.lines


def test_many_s_without_any_g_are_the_ratings_of_before_2022() -> None:
    found = profiled(count=200, rating=["s", "q", "e"])
    assert found.reading.legacy_ratings
    assert any("s is safe, as before 2022" in line for line in found.lines)
    assert found.reading.row({"rating": "s"})["rating"] == "safe"
    assert found.reading.row({"rating": "q"})["rating"] == "q"


def test_few_s_without_any_g_are_uncertain_and_a_flag_decides() -> None:
    found = profiled(count=6, rating=["s", "q", "e"])
    assert not found.reading.legacy_ratings
    assert "--ratings legacy" in uncertain(found)[0]
    assert profiled("ratings=legacy", count=6, rating=["s", "q"]).reading.legacy_ratings
    current = profiled("ratings=current", count=200, rating=["s", "q", "e"])
    assert not current.reading.legacy_ratings
    assert not uncertain(current)


@pytest.mark.parametrize("rating", [["sensitive", "s"], ["general", *["s"] * 199], [0, 1, 2, 3], ["q", "e"]])
def test_ratings_of_today_are_never_read_as_the_old_ones(rating: list[str]) -> None:
    assert not profiled(count=200, rating=rating).reading.legacy_ratings


def test_text_with_commas_is_split_at_commas() -> None:
    found = profiled(tags=["1girl, long hair", "solo", "a, b, c"])
    assert found.reading.commas == ("tags",)
    assert found.reading.row({"tags": "1girl, long hair"})["tags"] == ["1girl", "long hair"]
    assert profiled(tags=["1girl,solo,long hair"]).reading.commas == ("tags",)
    assert not profiled(tags=["1,000_yen solo smile", "1girl"]).reading.commas
    assert not profiled(tags=['["a", "b"]']).reading.commas


def test_mixed_separators_are_refused_until_a_flag_decides() -> None:
    mixed = ["1girl, solo", "1girl solo"]
    assert "give --tag-separator comma or space" in profiled(tags=mixed).problems[0]
    assert profiled("separator=comma", tags=mixed).reading.commas == ("tags",)
    assert profiled("separator=space", tags=mixed) == profiled("separator=space", tags=mixed)
    assert not profiled("separator=space", tags=mixed).problems


LABELS = {"names": ["1girl", "no_humans", "solo"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    "feature", [{"feature": LABELS, "_type": "Sequence"}, {"feature": LABELS, "_type": "List"}, [LABELS]]
)
def test_class_labels_are_read_by_their_names_in_the_footer(feature: Any) -> None:
    found = profiled(tags=[[0, 2], [1]], features={"tags": feature})
    assert not found.problems
    assert found.reading.row({"tags": [0, 2]})["tags"] == ["1girl", "solo"]
    with pytest.raises(UnreadableField, match="class label 3, but there are 3 names"):
        found.reading.row({"tags": [3]})


def test_a_rating_may_be_a_class_label_of_any_order() -> None:
    feature = {"names": ["explicit", "general"], "_type": "ClassLabel"}
    reading = profiled(rating=[0, 1], features={"rating": feature}).reading
    assert [reading.row({"rating": value})["rating"] for value in (0, 1, -1, None)] == [
        "explicit",
        "general",
        None,
        None,
    ]


def test_numbers_without_names_are_refused_with_samples_and_the_flag() -> None:
    [problem] = profiled(tags=[[470575, 13197]]).problems
    assert "a tag is 470575, not a name" in problem
    assert "--map COLUMN=FIELD" in problem


def test_what_some_rows_have_wrong_is_in_the_plan() -> None:
    found = profiled(
        tags=[*["solo"] * 48, [5], "solo"], created_at=[*["2021-05-06"] * 9, "05/06/2021"], rating=["g"] * 9 + ["R-18"]
    )
    assert not found.problems
    lines = "\n".join(uncertain(found))
    assert "2% of 100 samples are not understood: a tag is 5, not a name; such rows are rejected" in lines
    assert "10% of the dates cannot be read, for example '05/06/2021'" in lines
    assert "unknown in 10%: rating 'R-18'" in lines


def test_ids_that_cannot_be_read_are_in_the_plan() -> None:
    samples = [row | {"id": "1e3" if row["id"] % 2 else row["id"]} for row in rows()]
    found = profile(danbooru, samples, {}, {}, ReadingFlags())
    assert any("id: UNCERTAIN: 50% have none that can be read: id is '1e3'" in line for line in found.lines)


def test_a_folder_gives_a_field_unless_the_row_has_it() -> None:
    found = profile(danbooru, rows(rating=[None]), {}, {"rating": "e"}, ReadingFlags())
    assert "rating: from the folder's name (rating=e)" in found.lines
    assert found.reading.row({"id": 1})["rating"] == "e"
    assert found.reading.row({"id": 1, "rating": "g"})["rating"] == "g"
