"""Tags in every form give their names; what is no name is refused, never turned into text."""

import json

import pyarrow as pa
import pytest

from pipeline.sources.tag_lists import LEAST_SCORE, by_category, tag_names
from pipeline.sources.values import UnreadableField

NAMES = ["1girl", "long_hair", "saber_(fate)"]
SPELLED = ["1girl", "long hair", "saber (fate)"]


@pytest.mark.parametrize(
    "value",
    [
        "1girl long_hair  saber_(fate)",
        SPELLED,
        [*SPELLED, None, ""],
        json.dumps(SPELLED),
        repr(SPELLED),
        "['1girl' 'long hair'\n 'saber (fate)']",  # numpy's
        json.dumps([{"name": name} for name in SPELLED]),
        repr([{"tag": name, "score": 0.9} for name in SPELLED]),
        [{"name": name, "score": 0.9} for name in SPELLED],
        dict.fromkeys(SPELLED, 0.9),
        [(name, 0.9) for name in SPELLED],
        [[name, 0.9] for name in SPELLED],
        json.dumps(dict.fromkeys(SPELLED, 0.9)),
        {"tags": SPELLED},
        {"name": SPELLED, "score": [0.9, 0.8, 1]},  # as Hugging Face's libraries store a list of structs
        str(tuple(SPELLED)),
        "{'1girl', 'long hair', 'saber (fate)'}",
        [r"1girl", "long hair", r"saber \(fate\)"],
    ],
    ids=str,
)
def test_forms_of_a_list(value: object) -> None:
    assert tag_names(value) == NAMES


def test_commas_separate_where_the_column_says_so() -> None:
    assert tag_names("1girl, long hair,saber (fate), ", commas=True) == NAMES
    assert tag_names("1,000_yen solo") == ["1,000_yen", "solo"]


def test_a_map_of_arrow_is_read_and_low_scores_are_left_out() -> None:
    column = pa.array([[("1girl", 0.99), ("solo", LEAST_SCORE), ("cat", 0.1)]], pa.map_(pa.string(), pa.float32()))
    assert tag_names([("1girl", 0.99), ("solo", LEAST_SCORE), ("cat", 0.1)]) == ["1girl", "solo"]
    assert tag_names(column.to_pylist()[0])[0] == "1girl"


def test_html_entities_are_read_and_a_lone_ampersand_stays() -> None:
    assert tag_names("jeanne_d&#039;arc &gt;_&lt; d&d dungeons_&_copy") == [
        "jeanne_d'arc",
        ">_<",
        "d&d",
        "dungeons_&_copy",
    ]
    assert tag_names("&amp;gt;_&amp;lt;") == [">_<"]


@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", [], "[]", {}])
def test_no_tags(value: object) -> None:
    assert tag_names(value) == []


@pytest.mark.parametrize(
    "value",
    [
        *([470575, 13197], 7, [["a", "b", "c"]], {"1girl": "yes"}, [{"id": 5}], b"1girl"),
        *({"1girl": 98.5}, {"1girl": 5}, {"name": ["a"], "score": []}),
        *('["1girl", "so', "{1girl,solo}", "array(['a'])"),
    ],
    ids=str,
)
def test_what_holds_no_names_is_refused(value: object) -> None:
    with pytest.raises(UnreadableField):
        tag_names(value)


@pytest.mark.parametrize("form", [dict, json.dumps, lambda value: list(value.items())])
def test_lists_by_category(form: object) -> None:
    value = form({"general": ["solo"], "artist": ["a"], "character": None})  # type: ignore[operator]
    found = by_category(value)
    assert found is not None
    assert {name: tag_names(listed) for name, listed in found.items() if listed} == {
        "general": ["solo"],
        "artist": ["a"],
    }


@pytest.mark.parametrize("field", ["category", "type"])
@pytest.mark.parametrize("names", [("general", "artist", "Characters"), (0, 1, 4), ("0", "1", "4"), (0.0, 1.0, 4.0)])
def test_tags_that_name_their_category(field: str, names: tuple[object, ...]) -> None:
    tags = [{"name": name, field: category} for name, category in zip("abc", names, strict=True)]
    found = by_category([*tags, {"name": "d"}])
    assert found is not None
    assert {category: tag_names(listed) for category, listed in found.items() if listed} == {
        "general": ["a", "d"],
        "artist": ["b"],
        "character": ["c"],
    }
    with pytest.raises(UnreadableField, match="unknown category 'species'"):
        by_category([{"name": "fox", field: "species"}])


def test_categories_are_known_by_the_names_of_columns_and_in_the_plural() -> None:
    found = by_category({"tag_string_general": "solo", "artists": ["a"], "copyrights": None})
    assert found is not None
    assert (found["general"], found["artist"], found["copyright"]) == ("solo", ["a"], None)


@pytest.mark.parametrize("text", ["[o]_[o] 1girl", "(o)_(o)", "{} solo", "(9), 1girl, saber (fate)"])
def test_faces_are_no_lists(text: str) -> None:
    assert tag_names(text) == text.split()


def test_an_unknown_category_is_refused_unless_it_is_empty() -> None:
    with pytest.raises(UnreadableField, match="species"):
        by_category({"general": ["solo"], "species": ["fox"]})
    assert by_category({"general": ["solo"], "species": []}) is not None
    assert by_category(["solo"]) is None
