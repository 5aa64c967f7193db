"""Every form of a raw field in the sites' APIs and the public dumps is parsed to the same value."""

from datetime import UTC, datetime

import pytest

from pipeline.core.records import Post, Rating, Rejected
from pipeline.sources import danbooru, pixiv, recognise
from pipeline.sources.values import UnreadableField

DANBOORU = {"id": 7, "image": b"bytes", "rating": "g", "tag_string_general": "long_hair ^_^", "fav_count": 5}
PIXIV = {"id": 9_000_000_007, "image": {"bytes": b"bytes", "path": "9_p1.png"}, "tags": [], "x_restrict": 0, "page": 1}


def _post(outcome: Post | Rejected) -> Post:
    assert isinstance(outcome, Post), outcome
    return outcome


@pytest.mark.parametrize(
    ("spelling", "rating"),
    [
        ("g", Rating.GENERAL),
        ("s", Rating.SENSITIVE),
        (1, Rating.SENSITIVE),
        ("questionable", Rating.QUESTIONABLE),
        ("E", Rating.EXPLICIT),
        (" q ", Rating.QUESTIONABLE),
        (3.0, Rating.EXPLICIT),
        ("3.0", Rating.EXPLICIT),
        ("rating:safe", Rating.GENERAL),
        ("Rating.EXPLICIT", Rating.EXPLICIT),
        ("", None),
        (float("nan"), None),
        (None, None),
    ],
)
def test_danbooru_ratings(spelling: object, rating: Rating | None) -> None:
    assert _post(danbooru.read_row(DANBOORU | {"rating": spelling})).rating is rating


def test_later_pages_of_a_pixiv_work_have_the_first_as_their_parent() -> None:
    assert _post(pixiv.read_row(PIXIV)).parent == "pixiv:9000000007_p0"
    assert _post(pixiv.read_row(PIXIV | {"page": 0})).parent is None


@pytest.mark.parametrize(
    "image",
    [{"image": b"x"}, {"image": {"bytes": b"x", "path": "1.jpg"}}, {"image": None, "jpg": b"x"}, {"webp": b"x"}],
)
def test_the_image_is_read_from_binary_columns_and_from_the_hugging_face_struct(image: dict[str, object]) -> None:
    row = {key: value for key, value in DANBOORU.items() if key != "image"} | image
    assert _post(danbooru.read_row(row)).image == b"x"


@pytest.mark.parametrize(
    "tags",
    [{"tag_string_general": "a b"}, {"tags_general": ["a", "b"]}, {"tag_string": "a b"}, {"tags": ["a", "b"]}],
)
def test_danbooru_tags_may_be_text_or_lists_with_or_without_categories(tags: dict[str, object]) -> None:
    assert _post(danbooru.read_row({"id": "7", "image": b"x"} | tags)).tags["general"] == ["a", "b"]


@pytest.mark.parametrize(
    ("spelling", "moment"),
    [
        ("2008-08-12T00:46:05.385-04:00", datetime(2008, 8, 12, 4, 46, 5, tzinfo=UTC)),
        (1218516365, datetime(2008, 8, 12, 4, 46, 5, tzinfo=UTC)),
        (datetime(2008, 8, 12), datetime(2008, 8, 12, tzinfo=UTC)),
        ("yesterday", None),
    ],
)
def test_dates(spelling: object, moment: datetime | None) -> None:
    assert _post(danbooru.read_row(DANBOORU | {"created_at": spelling})).created_at == moment


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"is_deleted": True}, "deleted"),
        ({"is_banned": True}, "banned"),
        ({"file_ext": "MP4"}, "not a still picture"),
        ({"rating": "R-18"}, "unknown rating"),
        ({"tag_string_meta": "highres ai-generated"}, "made by AI"),
        ({"tag_string_general": "solo ai-assisted"}, "made by AI"),
    ],
)
def test_unusable_danbooru_posts_have_a_reason(field: dict[str, object], reason: str) -> None:
    outcome = danbooru.read_row(DANBOORU | field)
    assert isinstance(outcome, Rejected)
    assert (outcome.key, outcome.reason) == ("danbooru:7", reason)


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"type": "ugoira"}, "not a still picture"),
        ({"illust_ai_type": 2}, "made by AI"),
        ({"aiType": 2}, "made by AI"),
        ({"aiType": 1, "tags": ["空", "AIイラスト"]}, "made by AI"),
        ({"tags": [{"name": "Stable Diffusion", "translated_name": None}]}, "made by AI"),
        ({"type": None, "illustType": "2.0"}, "not a still picture"),
        ({"x_restrict": 7}, "unknown rating"),
        ({"image": {"bytes": b"x", "path": "img/limit_unknown_360.png"}}, "placeholder picture"),
    ],
)
def test_unusable_pixiv_pages_have_a_reason(field: dict[str, object], reason: str) -> None:
    outcome = pixiv.read_row(PIXIV | field)
    assert isinstance(outcome, Rejected)
    assert (outcome.key, outcome.reason) == ("pixiv:9000000007_p1", reason)


def test_pixiv_tags_are_english_if_translated_and_popularity_tags_are_dropped() -> None:
    tags = [
        {"name": "赤い星", "translated_name": "red star"},
        {"name": "星", "translated_name": None},
        {"name": "オリジナル1000users入り", "translated_name": "1000+ bookmarks"},
        {"tag": "空", "translation": {"en": "sky"}},
        "plain",
    ]
    expected = ["red_star", "星", "sky", "plain"]
    assert _post(pixiv.read_row(PIXIV | {"tags": tags})).tags["general"] == expected
    assert _post(pixiv.read_row(PIXIV | {"tags": {"tags": tags}})).tags["general"] == expected, (
        "nested as in the web API"
    )


@pytest.mark.parametrize(
    ("fields", "rating"),
    [
        ({"x_restrict": 0, "sanity_level": 2}, Rating.GENERAL),
        ({"x_restrict": 0, "sanity_level": 4}, Rating.SENSITIVE),
        ({"x_restrict": 2}, Rating.EXPLICIT),
        ({"x_restrict": None, "xRestrict": 1}, Rating.EXPLICIT),
        ({"x_restrict": None, "xRestrict": "R-18G"}, Rating.EXPLICIT),
        ({"x_restrict": 0, "tags": ["R-18"]}, Rating.EXPLICIT),
    ],
)
def test_pixiv_ratings_of_both_apis(fields: dict[str, object], rating: Rating) -> None:
    assert _post(pixiv.read_row(PIXIV | fields)).rating is rating


def test_a_layout_is_recognised_by_its_columns() -> None:
    assert recognise(DANBOORU) == "danbooru"
    assert recognise(PIXIV) == "pixiv"
    with pytest.raises(ValueError, match=r"found the columns \['colour', 'id'\].*missing for danbooru"):
        recognise(["id", "colour"])
    with pytest.raises(ValueError, match=r"missing .*image"):
        recognise(["id", "tag_string"], "danbooru")
    with pytest.raises(ValueError, match="pixiv's layout, not danbooru's"):
        recognise(PIXIV, "danbooru")


def test_a_row_without_an_id_is_an_error() -> None:
    with pytest.raises(ValueError, match="id is None"):
        danbooru.read_row({"id": None})


@pytest.mark.parametrize("flag", ["false", "f", "0", 0, False, None])
def test_a_flag_that_is_not_set_rejects_nothing_in_any_form(flag: object) -> None:
    assert isinstance(danbooru.read_row(DANBOORU | {"is_deleted": flag}), Post)
    assert isinstance(danbooru.read_row(DANBOORU | {"is_deleted": "true"}), Rejected)


def test_pixiv_tags_may_be_one_text_or_a_list_with_nulls() -> None:
    assert _post(pixiv.read_row(PIXIV | {"tags": "空 original"})).tags["general"] == ["空", "original"]
    assert _post(pixiv.read_row(PIXIV | {"tags": [None, "空"]})).tags["general"] == ["空"]
    with pytest.raises(UnreadableField, match="a tag is 7"):
        pixiv.read_row(PIXIV | {"tags": [7, "空"]})


def test_a_pixiv_id_beyond_64_bits_is_dropped() -> None:
    assert _post(danbooru.read_row(DANBOORU | {"pixiv_id": 2**70})).pixiv_id is None


def test_ratings_among_the_tags_are_not_taught() -> None:
    assert _post(pixiv.read_row(PIXIV | {"tags": ["R-18", "空", "r-18g"]})).tags["general"] == ["空"]
    assert _post(danbooru.read_row(DANBOORU | {"tag_string_general": "rating:e solo"})).tags["general"] == ["solo"]


@pytest.mark.parametrize(
    ("fields", "id"),
    [
        ({"id": "84200001_0"}, "pixiv:84200001_p0"),
        ({"id": "84200001_1"}, "pixiv:84200001_p1"),
        ({"id": "84200002_p3"}, "pixiv:84200002_p3"),
        ({"id": 5, "num": 2}, "pixiv:5_p2"),
        ({"id": 5, "page_index": "2.0"}, "pixiv:5_p2"),
        ({"id": 5, "image": {"bytes": b"x", "path": "5_p4_master1200.jpg"}}, "pixiv:5_p4"),
        ({"id": 5}, "pixiv:5_p0"),
    ],
)
def test_a_page_is_read_from_its_column_the_id_or_the_file_name(fields: dict[str, object], id: str) -> None:
    assert pixiv.row_id({"image": b"x"} | fields) == id


@pytest.mark.parametrize(
    "fields", [{"id": "84200001_x"}, {"id": "8_4_2"}, {"id": 5, "page": "first"}, {"id": 5, "page": -1}]
)
def test_a_page_or_id_that_is_not_understood_is_no_id(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is "):
        pixiv.row_id(fields)


def test_tags_without_a_category_fill_an_empty_general_list() -> None:
    row = {"tag_string_general": None, "tag_string_artist": "somebody", "tag_string": "1girl solo somebody"}
    tags = _post(danbooru.read_row(DANBOORU | row)).tags
    assert (tags["general"], tags["artist"]) == (["1girl", "solo"], ["somebody"])


def test_a_layout_that_fits_both_sites_asks_for_the_source() -> None:
    with pytest.raises(ValueError, match="Give --source danbooru or pixiv"):
        recognise(["id", "image", "tags", "rating", "score"])


def test_tags_of_one_list_give_categories_and_the_rating_that_no_field_gives() -> None:
    row = {"id": 1, "tags": "artist:bob character:miku 1girl rating:e"}
    post = danbooru.read_row(row)
    assert isinstance(post, Post)
    assert (post.tags["artist"], post.tags["character"], post.tags["general"]) == (["bob"], ["miku"], ["1girl"])
    assert post.rating == "explicit"
    told = danbooru.read_row(row | {"rating": "g"})
    assert isinstance(told, Post)
    assert told.rating == "general"


@pytest.mark.parametrize("tag", ["ai-generated", "ai_generated", "Stable_Diffusion"])
def test_posts_by_ai_are_known_by_any_of_their_tags(tag: str) -> None:
    outcome = danbooru.read_row({"id": 1, "tags": ["1girl", tag]})
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "made by AI"


@pytest.mark.parametrize(
    "fields",
    [
        {"illust_ai_type": True},
        {"aiType": "2"},
        {"tags": ["#NovelAI"]},
        {"tags": [{"name": "人工知能", "translated_name": "AI-generated"}]},
    ],
)
def test_works_by_ai_are_known_by_flag_tag_and_translation(fields: dict[str, object]) -> None:
    outcome = pixiv.read_row({"id": 1, "tags": ["空"]} | fields)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "made by AI"


def test_an_unknown_kind_of_ai_is_not_guessed() -> None:
    with pytest.raises(UnreadableField, match="illust_ai_type is '7'"):
        pixiv.read_row({"id": 1, "tags": ["空"], "illust_ai_type": 7})


@pytest.mark.parametrize(
    ("value", "rating"), [(True, "explicit"), (False, "general"), ("Safe", "general"), ("R-18G", "explicit")]
)
def test_restrictions_in_words(value: object, rating: str) -> None:
    post = pixiv.read_row({"id": 1, "tags": ["空"], "x_restrict": value})
    assert isinstance(post, Post)
    assert post.rating == rating


def test_a_page_in_a_file_name_needs_the_id_of_the_work_and_must_not_contradict_the_column() -> None:
    image = {"bytes": b"", "path": "folder/9_3.png"}
    assert pixiv.row_id({"id": 9, "image": image}) == "pixiv:9_p3"
    assert pixiv.row_id({"id": 8, "image": image}) == "pixiv:8_p0"
    assert pixiv.row_id({"id": "9_p1", "page": 1}) == "pixiv:9_p1"
    with pytest.raises(ValueError, match="id is '9_p1', page is 0"):
        pixiv.row_id({"id": "9_p1", "page": 0})


@pytest.mark.parametrize("user", ["bob", {"name": "bob"}, '{"id": 1, "name": "bob"}', "{'name': 'bob'}"])
def test_an_artist_in_any_form(user: object) -> None:
    post = pixiv.read_row({"id": 1, "tags": ["空"], "user": user})
    assert isinstance(post, Post)
    assert post.tags["artist"] == ["bob"]
