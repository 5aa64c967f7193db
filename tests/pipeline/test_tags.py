import pytest

from pipeline.tags import EXCLUDED, TagReader, TagRules, as_words, is_special, without_separators


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
    cleaned = without_separators(text)
    assert not any(separator in cleaned for separator in ("|||", "%%", "$$"))
    assert cleaned == cleaned.strip()


@pytest.mark.parametrize(
    "words",
    ["1girl", "2girls", "6+girls", "multiple girls", "1boy", "2boys", "multiple boys", "1other", "multiple others",
     "solo", "male focus", "no humans"],
)  # fmt: skip
def test_who_is_in_the_picture_is_special(words: str) -> None:
    assert is_special(words)


@pytest.mark.parametrize("words", ["girl", "girls only", "1girls fighting", "multiple views", "solo leveling", "boy"])
def test_what_only_sounds_like_it_is_not(words: str) -> None:
    assert not is_special(words)


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


def test_every_part_is_there_even_when_empty() -> None:
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


def test_the_dropped_words_can_be_changed() -> None:
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
        assert reader.exclusion(["sky", tag, "sea"]) == as_words(tag)
        assert reader.exclusion(["sky", tag.replace("_", " ")]) == as_words(tag)
    assert reader.exclusion(["sky", "cosplay", "text-only page layout"]) is None


def test_each_exclusion_is_a_switch() -> None:
    for tag in EXCLUDED:
        lenient = TagReader(TagRules(excluded=EXCLUDED - {tag}))
        assert lenient.exclusion([tag]) is None
        assert all(lenient.exclusion([other]) for other in EXCLUDED - {tag})


def test_what_was_met_before_changes_nothing() -> None:
    tags = {"general": ["1girl", "sky", "2girls"], "meta": ["bad_id", "highres"]}
    reader = TagReader()
    assert reader.text_parts(tags) == reader.text_parts(tags) == TagReader().text_parts(tags)
