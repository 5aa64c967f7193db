"""Training texts: the order of their parts, dropout, and determinism."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from trainer.samples.training_text import CaptionConfig, TextParts, full_text, training_text

PARTS = TextParts(
    special=("1girl", "solo"),
    character=("akari",),
    copyright=("sample tales",),
    artist=("ink otter",),
    general=("red hair", "night", "smile", "umbrella"),
    meta=("highres",),
    caption="A girl waits in the rain. Lamps are lit.",
    quality="masterpiece",
    era="newest",
    rating="safe",
)
KEEP_ALL = CaptionConfig(tag_dropout=0, group_dropout=0, caption_dropout=0, caption_only=0, tags_only=0)
WHOLE = (
    "1girl, solo, akari, sample tales, ink otter, red hair, night, smile, umbrella, "
    "A girl waits in the rain. Lamps are lit, masterpiece, newest, safe, highres"
)


def draws(config: CaptionConfig, parts: TextParts = PARTS, count: int = 4000) -> list[str]:
    generator = np.random.default_rng(0)
    return [training_text(parts, generator, config) for _ in range(count)]


def share(texts: list[str], words: str) -> float:
    return sum(words in text for text in texts) / len(texts)


def test_the_full_text_has_every_part_in_order() -> None:
    assert full_text(PARTS) == WHOLE


def test_without_dropouts_only_the_order_of_the_general_tags_changes() -> None:
    texts = draws(KEEP_ALL, count=400)
    assert {tuple(sorted(text.split(", "))) for text in texts} == {tuple(sorted(WHOLE.split(", ")))}
    for text in texts:
        words = text.split(", ")
        assert words[:5] == WHOLE.split(", ")[:5]
        assert words[9:] == WHOLE.split(", ")[9:]
    orders = Counter(tuple(text.split(", ")[5:9]) for text in texts)
    assert len(orders) == 24


def test_general_tags_are_dropped_independently() -> None:
    texts = draws(replace(KEEP_ALL, tag_dropout=0.25))
    for tag in PARTS.general:
        assert share(texts, tag) == pytest.approx(0.75, abs=0.03)
    assert share(texts, "red hair") * share(texts, "smile") == pytest.approx(
        sum("red hair" in t and "smile" in t for t in texts) / len(texts), abs=0.03
    )
    assert share(texts, "akari") == 1


def test_groups_are_dropped_whole() -> None:
    texts = draws(replace(KEEP_ALL, group_dropout=0.3))
    for word in ("akari", "sample tales", "ink otter", "smile", "masterpiece", "newest", "safe", "highres"):
        assert share(texts, word) == pytest.approx(0.7, abs=0.03)
    assert all(len({tag in text for tag in PARTS.general}) == 1 for text in texts)


def test_the_caption_and_the_general_tags_are_mixed_as_configured() -> None:
    texts = draws(replace(KEEP_ALL, caption_only=0.5, tags_only=0.2))
    kinds = Counter(("smile" in text, "rain" in text) for text in texts)
    assert kinds[False, True] / len(texts) == pytest.approx(0.5, abs=0.03)
    assert kinds[True, False] / len(texts) == pytest.approx(0.2, abs=0.03)
    assert kinds[False, False] == 0


def test_a_missing_caption_or_missing_tags_are_never_chosen() -> None:
    no_caption = replace(PARTS, caption=None)
    no_tags = replace(PARTS, general=())
    assert share(draws(replace(KEEP_ALL, caption_only=1.0), no_caption, 50), "smile") == 1
    assert share(draws(replace(KEEP_ALL, tags_only=1.0), no_tags, 50), "rain") == 1


def test_special_tags_are_only_dropped_with_the_whole_text() -> None:
    config = CaptionConfig(tag_dropout=1, group_dropout=1, caption_dropout=0.1, caption_only=0, tags_only=1)
    texts = draws(config)
    assert set(texts) == {"", "1girl, solo"}
    assert texts.count("") / len(texts) == pytest.approx(0.1, abs=0.02)


def test_the_same_generator_state_gives_the_same_text() -> None:
    config = CaptionConfig()
    texts = [training_text(PARTS, np.random.default_rng(seed), config) for seed in range(20)]
    assert texts == [training_text(PARTS, np.random.default_rng(seed), config) for seed in range(20)]
    assert len(set(texts)) > 10


def test_separators_and_extra_spaces_are_removed() -> None:
    parts = TextParts(general=("a|||b", "%%", "c $$ d"), caption="One\n%%two$$  three. ")
    assert full_text(parts) == "a b, c d, One two three"


def test_a_picture_without_metadata_has_an_empty_text() -> None:
    assert full_text(TextParts()) == ""
    assert training_text(TextParts(), np.random.default_rng(0), CaptionConfig()) == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"tag_dropout": 1.5}, "tag_dropout 1.5"), ({"caption_only": 0.7, "tags_only": 0.6}, "0.7 .* 0.6")],
)
def test_invalid_probabilities_are_refused(fields: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CaptionConfig(**fields)
