import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.records import TAG_CATEGORIES
from pipeline.tagging.tag_columns import TagColumn, first_excluded, remove_caption_separators, text_columns
from pipeline.tagging.tags import (
    EXCLUDED,
    IMPLIED,
    TagReader,
    TagRules,
    as_words,
    read_list,
    read_pairs,
    remove_separators,
)


def general(*tags: str) -> dict[str, list[str]]:
    return TagReader().text_parts({"general": tags})


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("long_hair", "long hair"),
        ("hatsune_miku_(vocaloid)", "hatsune miku (vocaloid)"),
        ("^_^", "^_^"),
        (">_<", ">_<"),
        ("o_o", "o_o"),
        ("a_bc", "a bc"),
        ("_long__hair_", "long hair"),
        ("well,_well", "well well"),
        ("a|||b%%c$$d", "a b c d"),
        ("初音ミク", "初音ミク"),
        ("___", "___"),
        ("____", ""),
    ],
)
def test_a_tag_becomes_words(tag: str, words: str) -> None:
    assert as_words(tag) == words


@pytest.mark.parametrize("text", ["|||||", "%%%", "$$$$", "%|||%", "$%%$", "|%%||", "a |||  b\n$$"])
def test_no_separator_is_left_in_any_text(text: str) -> None:
    cleaned = remove_separators(text)
    assert not any(separator in cleaned for separator in ("|||", "%%", "$$"))
    assert cleaned == cleaned.strip()


@pytest.mark.parametrize(
    "words",
    ["1girl", "2girls", "6+girls", "multiple girls", "1boy", "2boys", "multiple boys", "1other", "multiple others",
     "solo", "male focus", "no humans"],
)  # fmt: skip
def test_counts_and_solo_tags_are_special(words: str) -> None:
    assert TagReader().is_special(words)


@pytest.mark.parametrize("words", ["girl", "girls only", "1girls fighting", "multiple views", "solo leveling", "boy"])
def test_similar_tags_are_not_special(words: str) -> None:
    assert not TagReader().is_special(words)


def test_tags_go_to_their_parts_in_their_order() -> None:
    parts = TagReader().text_parts(
        {
            "general": ["long_hair", "1girl", "^_^", "long_hair", "solo", "sky"],
            "character": ["hatsune_miku"],
            "copyright": ["vocaloid"],
            "artist": ["some_one"],
            "meta": ["highres"],
        }
    )
    assert parts == {
        "special": ["1girl", "solo"],
        "character": ["hatsune miku"],
        "copyright": ["vocaloid"],
        "artist": ["some one"],
        "general": ["long hair", "^_^", "sky"],
        "meta": ["highres"],
    }


def test_only_general_tags_are_special() -> None:
    assert TagReader().text_parts({"artist": ["solo"], "general": []})["artist"] == ["solo"]


def test_every_part_exists_even_if_empty() -> None:
    assert list(TagReader().text_parts({})) == ["special", "character", "copyright", "artist", "general", "meta"]
    assert not any(general("").values())


@pytest.mark.parametrize(
    "tag",
    ["photo_(medium)", "commentary_request", "english_commentary", "bad_id", "bad_pixiv_id", "partially_translated",
     "translation_request", "md5_mismatch", "revision", "has_audio", "video"],
)  # fmt: skip
def test_meta_tags_about_the_post_are_dropped(tag: str) -> None:
    parts = TagReader().text_parts({"meta": ["absurdres", tag], "general": [tag]})
    assert parts["meta"] == ["absurdres"]
    assert parts["general"] == [as_words(tag)]


def test_the_dropped_meta_words_can_be_changed() -> None:
    parts = TagReader(TagRules(dropped_meta=("res",))).text_parts({"meta": ["absurdres", "bad_id"]})
    assert parts["meta"] == ["bad id"]


@pytest.mark.parametrize(
    "tag", ["1000users入り", "初音ミク10000users入り", "5000Users入り", "1,000+_bookmarks", "vocaloid_500+_bookmarks"]
)
def test_popularity_does_not_leak_into_the_text(tag: str) -> None:
    assert general("sky", tag)["general"] == ["sky"]


def test_excluded_pictures_name_their_tag() -> None:
    reader = TagReader()
    for tag in EXCLUDED:
        assert reader.excluded(tag) == as_words(tag)
        assert reader.excluded(tag.replace("_", " ")) == as_words(tag)
    assert not any(map(reader.excluded, ["sky", "cosplay", "text-only page layout"]))


def test_each_excluded_tag_can_be_admitted() -> None:
    for tag in EXCLUDED:
        lenient = TagReader(TagRules(excluded=EXCLUDED - {tag}))
        assert not lenient.excluded(tag)
        assert all(lenient.excluded(other) for other in EXCLUDED - {tag})


def test_cached_answers_equal_new_ones() -> None:
    tags = {"general": ["1girl", "sky", "2girls"], "meta": ["bad_id", "highres"]}
    reader = TagReader()
    assert reader.text_parts(tags) == reader.text_parts(tags) == TagReader().text_parts(tags)


# --- Aliases, implications, blacklist ---------------------------------------------------------------------------------


def text(rules: TagRules, *tags: str) -> list[str]:
    return TagReader(rules).text_parts({"general": tags})["general"]


def test_an_alias_replaces_its_tag_once_and_may_be_a_chain() -> None:
    rules = TagRules(aliases={"gray_hair": "grey_hair", "silver hair": "gray_hair", "one_girl": "1girl"})
    assert text(rules, "silver_hair", "sky", "gray_hair", "grey_hair") == ["grey hair", "sky"]
    assert TagReader(rules).text_parts({"general": ["one_girl"]})["special"] == ["1girl"]


@pytest.mark.parametrize(
    ("implied", "words"),
    [
        ("add", ["very long hair", "long hair", "hair", "sky"]),
        ("drop", ["very long hair", "sky"]),
        ("keep", ["very long hair", "sky", "long hair"]),
    ],
)
def test_direct_and_indirect_implications_are_added_dropped_or_kept(implied: str, words: list[str]) -> None:
    chain = {"very_long_hair": ("long_hair",), "long_hair": ("hair",)}
    rules = TagRules(implications=chain, implied=implied)  # type: ignore[arg-type]
    assert text(rules, "very_long_hair", "sky", "long_hair") == words
    assert text(rules, "sky") == ["sky"]


def test_implications_apply_to_aliased_names() -> None:
    rules = TagRules(aliases={"neko": "cat_ears"}, implications={"neko": ("animal_ears",)})
    assert text(rules, "neko") == text(rules, "cat_ears") == ["cat ears", "animal ears"]


def test_the_blacklist_removes_words_from_any_origin_but_no_picture() -> None:
    rules = TagRules(blacklist=frozenset({"tagme"}), aliases={"tag_me": "tagme"}, implications={"sky": ("tagme",)})
    assert text(rules, "tagme", "tag_me", "sky") == ["sky"]
    assert not TagReader(rules).excluded("tagme")


def test_an_excluded_tag_is_found_by_every_alias() -> None:
    reader = TagReader(TagRules(excluded=frozenset({"comic"}), aliases={"manga": "comic"}))
    assert reader.excluded("manga") == reader.excluded("comic") == "comic"


def test_cycles_are_refused() -> None:
    with pytest.raises(ValueError, match="a -> b -> a"):
        TagReader(TagRules(blacklist=frozenset({"a"}), aliases={"a": "b", "b": "a"}))
    with pytest.raises(ValueError, match="a implies itself"):
        TagReader(TagRules(implications={"a": ("b",), "b": ("a",)}))


def test_rule_files_are_lines_without_comments() -> None:
    assert read_list("# why\n\n tagme \nx_(y)#1\n") == ["tagme", "x_(y)#1"]
    assert read_pairs("a -> b\n# c -> d\na->c, d\n^_^ -> >_<") == {"a": ("b", "c", "d"), "^_^": (">_<",)}
    for line in ("a", "a ->", "-> b", "a -> b,", "a => b"):
        with pytest.raises(ValueError, match="is not of the form"):
            read_pairs(line)


@pytest.mark.parametrize("implied", IMPLIED)
def test_columns_equal_posts_read_one_by_one(implied: str) -> None:
    """500 random posts with few tags that are renamed, implied, dropped, special, leaking and repeated."""
    names = [
        "1girl",
        "solo",
        "a_tag",
        "b_tag",
        "c_tag",
        "d_tag",
        "e,f",
        "^_^",
        "100users入り",
        "bad_id",
        "comic",
        "____",
    ]
    rules = TagRules(
        excluded=frozenset({"comic", "c tag"}),
        aliases={"d_tag": "a_tag", "e,f": "solo"},
        implications={"a_tag": ("b_tag", "2girls"), "b_tag": ("c_tag",), "solo": ("^_^",)},
        implied=implied,  # type: ignore[arg-type]
        blacklist=frozenset({"c_tag"}),
    )
    rng = np.random.default_rng(0)
    posts = [{c: rng.choice(names, rng.integers(0, 8)).tolist() for c in TAG_CATEGORIES} for _ in range(500)]
    columns = {
        category: TagColumn.of(
            pa.chunked_array(
                [
                    pa.array([post[category] for post in part], pa.list_(pa.string()))
                    for part in (posts[:200], posts[200:])
                ]
            )
        )
        for category in TAG_CATEGORIES
    }
    reader = TagReader(rules)
    read = text_columns(columns, reader)
    expected = [TagReader(rules).text_parts(post) for post in posts]
    assert [{part: read[part][row].as_py() for part in read} for row in range(500)] == expected
    excluded = first_excluded(columns, reader)
    for row, post in enumerate(posts):
        every = (reader.excluded(tag) for category in TAG_CATEGORIES for tag in post[category])
        assert excluded.get(row) == next(filter(None, every), None)


def test_caption_columns_equal_captions_cleaned_one_by_one() -> None:
    pieces = ["a girl", " ", "\n", "\u3000", "\x1f", "|", "||", "%", "$", "夜", ""]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(pieces, rng.integers(0, 6))) for _ in range(2000)]
    column = pa.chunked_array([texts[:900], [None], texts[900:]], pa.string())
    found = remove_caption_separators(column).to_pylist()
    assert found == [*map(remove_separators, texts[:900]), None, *map(remove_separators, texts[900:])]
    assert any(text != cleaned for text, cleaned in zip(texts, found, strict=False))


def test_columns_of_no_posts_are_empty() -> None:
    empty = TagColumn.of(pa.chunked_array([], pa.list_(pa.string())))
    columns = text_columns(dict.fromkeys(TAG_CATEGORIES, empty), TagReader())
    assert all(len(column) == 0 for column in columns.values())
