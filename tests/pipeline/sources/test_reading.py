"""How columns are read, decided from samples: with evidence, or refused with the flag that resolves it."""

from typing import Any

import pytest

from pipeline.sources import danbooru, pixiv
from pipeline.sources.reading import Profile, Reading, ReadingFlags, profile
from pipeline.sources.values import UnreadableField


def rows(count: int = 100, **columns: Any) -> list[dict[str, Any]]:
    """Rows of Danbooru. A column's list is repeated."""
    given: dict[str, Any] = {"rating": ["g", "s", "q", "e"], "created_at": ["2021-05-06"], "tags": ["1girl solo"]}
    given = given | columns
    return [{"id": i} | {name: values[i % len(values)] for name, values in given.items()} for i in range(count)]


def profiled(*flags: str, features: dict[str, Any] | None = None, **columns: Any) -> Profile:
    asked = ReadingFlags(**dict(flag.split("=") for flag in flags))  # type: ignore[arg-type]
    return profile(danbooru, [({}, row) for row in rows(**columns)], features or {}, asked)


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
    samples = [({}, row | {"id": "1e3" if row["id"] % 2 else row["id"]}) for row in rows()]
    found = profile(danbooru, samples, {}, ReadingFlags())
    assert any("id: UNCERTAIN: 50% have none that can be read: id is '1e3'" in line for line in found.lines)


def test_a_folder_gives_a_field_unless_the_row_has_it() -> None:
    reading = Reading(constants=(("rating", "e"),))
    given: list[dict[str, Any]] = [{"id": 1}, {"id": 1, "rating": None}, {"id": 1, "rating": "g"}]
    assert [reading.row(row)["rating"] for row in given] == ["e", "e", "g"]


def test_the_ratings_of_all_folders_are_seen_and_columns_that_differ_are_reported() -> None:
    samples = [({"rating": "sqe"[i % 3]}, row) for i, row in enumerate(rows(count=200, rating=[None]))]
    found = profile(danbooru, samples, {}, ReadingFlags())
    assert "rating: from the folder's name (rating=s, rating=q, rating=e)" in found.lines
    assert found.reading.legacy_ratings
    [line] = uncertain(profile(danbooru, [({"rating": "e"}, row) for row in rows(rating=["g"])], {}, ReadingFlags()))
    assert "differs from the folder's name, for example 'g' in rating=e" in line


def test_class_labels_are_read_inside_structs_and_from_any_type() -> None:
    feature = [{"label": LABELS, "score": {"dtype": "float32", "_type": "Value"}}]
    found = profiled(tags=[[{"label": 0, "score": 0.9}]], features={"tags": feature})
    assert found.reading.row({"tags": [{"label": 2, "score": 0.9}]})["tags"] == [{"label": "solo", "score": 0.9}]
    reading = profiled(rating=[0.0, None], features={"rating": {"names": ["e", "g"], "_type": "ClassLabel"}}).reading
    assert [reading.row({"rating": value})["rating"] for value in (1.0, "1", "g", b"g")] == ["g"] * 4


@pytest.mark.parametrize(
    "text", ["1girl; solo; long hair", "1girl|solo|smile", "1girl\nlong hair", "1girl、solo、smile"]
)
def test_text_with_other_separators_is_refused(text: str) -> None:
    [problem] = profiled(tags=[text]).problems
    assert "neither spaces nor commas separate the tags" in problem
    assert not profiled("separator=space", tags=[text]).problems


@pytest.mark.parametrize("text", ["steins;gate ;) smile", "&amp;gt;_&lt; solo &#039;", "||_|| solo", "1girl\nsolo"])
def test_tags_with_such_characters_are_text_with_spaces(text: str) -> None:
    assert not profiled(tags=[text]).problems


@pytest.mark.parametrize("text", ["1girl, solo", "1girl solo long_hair"])
def test_lists_of_one_text_with_several_tags_are_refused(text: str) -> None:
    assert "lists of one text each" in profiled(tags=[[text]]).problems[0]
    assert not profiled(tags=[["long hair"]]).problems


def test_a_few_texts_with_another_separator_are_in_the_plan() -> None:
    [line] = uncertain(profiled(tags=[*["1girl, long hair"] * 19, "1girl solo"]))
    assert "commas separate the tags in 95% of the samples" in line
    assert "'1girl solo': give --tag-separator" in line


def test_scores_that_leave_out_tags_are_in_the_plan() -> None:
    lines = profiled(tags=[{"1girl": 0.9, "solo": 0.1}]).lines
    assert any("tags below 0.35 are left out" in line for line in lines)


def test_rating_numbers_are_explained_and_refused_if_they_start_elsewhere() -> None:
    lines = profiled(rating=[0, 1, 2, 3]).lines
    assert any("numbers 0, 1, 2, 3 are read as 0 general" in line for line in lines)
    assert "numbers 0, 1, 2 are read as" in uncertain(profiled(rating=[0, 1, 2]))[0]
    assert "write the letters" in profiled(rating=[1, 2, 3, 4]).problems[0]


def test_columns_without_any_readable_value_are_refused() -> None:
    assert "--map COLUMN=id" in profile(danbooru, [({}, {"id": "x"})] * 9, {}, ReadingFlags()).problems[0]
    assert "--admit 'unknown rating'" in profiled(rating=["R-18"]).problems[0]
    flags = ReadingFlags()
    assert not profile(danbooru, [({}, row) for row in rows(rating=["R-18"])], {}, flags, ["unknown rating"]).problems


def test_numbers_tags_and_ids_that_are_lost_are_in_the_plan() -> None:
    lines = uncertain(profiled(score=["1,234", "5k"], tags=[None]))
    assert any("score: UNCERTAIN: 50% are no number that can be read, for example '5k'" in line for line in lines)
    assert any("tags: UNCERTAIN: 100% of the samples have none" in line for line in lines)
    same = [({}, {"id": 5, "tags": "solo"})] * 4
    assert "75% of the samples repeat an id" in uncertain(profile(danbooru, same, {}, ReadingFlags()))[0]


def test_pages_without_a_first_are_in_the_plan() -> None:
    samples = [({}, {"id": i, "page": 1 + i % 2, "tags": ["空"]}) for i in range(4)]
    [line] = uncertain(profile(pixiv, samples, {}, ReadingFlags()))
    assert "the first page of a work is 0" in line
