"""Every failure mode of a captioning model is found in texts that have it, and only in those."""

import json
from pathlib import Path

import pytest

from captioner.answers import check, repeated_captions
from captioner.requests import Answer, CaptionReason, CaptionRequest, Note

# Good captions and the tags of their pictures.
GOOD = [
    (CaptionRequest(f"good:{number}", row["tags"]), row["caption"])
    for number, row in enumerate(
        map(json.loads, Path(__file__).with_name("good_captions.jsonl").read_text(encoding="utf-8").splitlines())
    )
]
GIRL = {"special": ["1girl", "solo"], "general": ["blue hair", "green eyes", "umbrella"]}
PLAIN = "A girl with blue hair stands under a clear umbrella on a wet street. Neon signs glow behind her."


def verdict(text: str, tags: dict[str, list[str]] | None = None, finish: str | None = "stop") -> Answer:
    return check(text, finish, CaptionRequest("danbooru:1", GIRL if tags is None else tags))


@pytest.mark.parametrize(("request_", "caption"), GOOD)
@pytest.mark.parametrize("finish", ["stop", "length", None])
def test_a_good_caption_passes_unchanged(request_: CaptionRequest, caption: str, finish: str | None) -> None:
    assert check(caption, finish, request_) == Answer(request_.id, caption, None)


def test_there_are_enough_good_captions() -> None:
    assert len(GOOD) >= 15
    assert len({caption for _, caption in GOOD}) == len(GOOD)


@pytest.mark.parametrize("text", ["", "   \n\t", "\n"])
def test_an_empty_text_is_rejected(text: str) -> None:
    assert verdict(text).reason == CaptionReason.EMPTY


@pytest.mark.parametrize(
    "token", ["[IMG]", "[IMG_BREAK]", "[INST]", "[/INST]", "</s>", "<s>", "<|im_end|>", "<|", "[INST"]
)
def test_a_special_token_is_rejected(token: str) -> None:
    assert verdict(f"{PLAIN} {token}").reason == CaptionReason.TOKENS


@pytest.mark.parametrize("harmless", ["[3]", "<3", "|", "[img]ination", "A > B", "[OPEN]"])
def test_other_brackets_are_accepted(harmless: str) -> None:
    assert verdict(f"{PLAIN} Her phone shows {harmless} in white.").reason is None


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\u202e", "\ufffd", "\ue000", "\x7f", "\u200b"])
def test_control_characters_are_rejected(character: str) -> None:
    assert verdict(PLAIN.replace("wet", f"we{character}t")).reason == CaptionReason.CONTROL


def test_line_breaks_and_emoji_are_accepted() -> None:
    assert verdict(PLAIN.replace(". ", ".\r\n\n")).caption == PLAIN
    assert verdict(f"{PLAIN} Her phone shows a 👩‍🎨 in pink.").reason is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't describe this image.",
        "I’m sorry, I cannot assist with that request.",
        "Sorry, I can't help with that.",
        "I cannot provide a description of explicit content.",
        "I am unable to view images, so here is a generic description of a girl instead.",
        "Unfortunately, I can't see the image. Please upload it again.",
        "As an AI language model, I do not describe people.",
        "I apologize, but this is not something I can write about.",
        "The picture is unclear. I'm not able to describe it.",
        "This image violates the content policy.",
        "It is not appropriate to describe this drawing in detail.",
        "No image was provided, so there is nothing to describe here.",
        "I must decline to describe this drawing.",
    ],
)
def test_a_refusal_is_recognised(text: str) -> None:
    assert verdict(text, {}).reason == CaptionReason.REFUSAL


@pytest.mark.parametrize(
    "text",
    [
        'A girl holds a card that says "I\'m sorry" and bows deeply in front of a closed door.',
        "An AI robot sits at a desk, and as an artist would, holds a brush over an empty canvas.",
        "A boy who is unable to reach the shelf stands on a stack of books. Nobody is there to help.",
    ],
)
def test_an_apology_in_the_picture_is_not_a_refusal(text: str) -> None:
    assert verdict(text, {}).reason is None


@pytest.mark.parametrize(
    "text",
    [
        "青い髪の少女が透明な傘を持って濡れた道に立っている。後ろにはネオンの看板が光っている。",
        "Девушка с голубыми волосами стоит под прозрачным зонтом на мокрой улице.",
        "Une fille aux cheveux bleus se tient sous un parapluie dans une rue avec des enseignes. Elle sourit.",
        "Una chica con el pelo azul está de pie en la calle con un paraguas. Lleva una falda.",
        "Ein Mädchen mit blauen Haaren steht unter einem Schirm auf der Straße und die Lichter sind an.",
        "A girl stands here. 彼女は青い髪をしていて、透明な傘を持っています。とても綺麗な夜の街です。",
    ],
)
def test_other_languages_are_rejected(text: str) -> None:
    assert verdict(text).reason == CaptionReason.LANGUAGE


@pytest.mark.parametrize(
    "text",
    [
        'A shop sign above the door reads "いらっしゃいませ本日限定大安売り" in red letters.',
        "A café table by the window holds a crème brûlée, a cup and a naïve drawing of a cat.",
        "A girl wears a yukata with a koi pattern on it, no shoes, and an obi tied at the back.",
    ],
)
def test_english_may_have_foreign_quotations_and_words(text: str) -> None:
    assert verdict(text, {}).reason is None


@pytest.mark.parametrize(
    ("opener", "rest"),
    [
        ("The image shows ", "a girl with blue hair under an umbrella."),
        ("This image depicts ", "a girl with blue hair under an umbrella."),
        ("The illustration features ", "two lanterns hanging from a wooden beam."),
        ("In this image, ", "a girl with blue hair holds an umbrella."),
        ("In this vibrant anime-style illustration, we see ", "a girl with blue hair and an umbrella."),
        ("In this image ", "a girl with blue hair holds an umbrella."),
        ("The image is ", "a close view of a girl with blue hair."),
        ("This digital artwork portrays ", "a girl with blue hair in the rain."),
    ],
)
def test_openers_are_removed_and_noted(opener: str, rest: str) -> None:
    answer = verdict(opener + rest)
    assert answer == Answer("danbooru:1", rest[0].upper() + rest[1:], None, (Note.OPENER,))


@pytest.mark.parametrize(
    "preamble",
    [
        "Sure! ",
        "Here is a description of the image: ",
        "Certainly! Here's the caption:\n\n",
        "Description: ",
        "**Caption:** ",
    ],
)
def test_preambles_are_removed_and_noted(preamble: str) -> None:
    assert verdict(preamble + PLAIN) == Answer("danbooru:1", PLAIN, None, (Note.PREAMBLE,))


def test_a_preamble_before_an_opener_is_removed_too() -> None:
    answer = verdict("Sure! Here's a description: The image shows a girl with blue hair under an umbrella.")
    assert answer.caption == "A girl with blue hair under an umbrella."
    assert answer.notes == (Note.PREAMBLE, Note.OPENER)


@pytest.mark.parametrize(
    "text",
    [
        "The image on the wall shows a ship in a storm above a small brass plate.",
        "A girl smiles beside the picture, and the girl in the picture shows a peace sign.",
        "The girl in the picture shows a peace sign and the boy beside her laughs.",
        "In the picture frame above the bed hangs a dried flower under glass.",
        "Great waves crash against the rocks below a white lighthouse.",
        "Here are two roads: one leads to the sea, one to the hills.",
        "The picture frame leans against a chair in an empty room with bare walls.",
        "This is a wooden shelf with a row of small glass bottles on it.",
        "Here a cat sleeps on a stack of old books beside an open window.",
    ],
)
def test_similar_words_are_not_an_opener(text: str) -> None:
    assert verdict(text, {}).caption == text


def test_a_later_mention_of_the_image_is_only_noted() -> None:
    text = f"{PLAIN} The image has a cold blue tone."
    assert verdict(text) == Answer("danbooru:1", text, None, (Note.MENTIONS_IMAGE,))


@pytest.mark.parametrize("separator", ["|||", "%%", "$$", "%|||%", "|||||", "$$$$"])
def test_separators_are_removed(separator: str) -> None:
    answer = verdict(PLAIN.replace(" on a wet", f" {separator} on a wet"))
    assert answer.caption is not None
    assert not any(s in answer.caption for s in ("|||", "%%", "$$"))
    assert answer.notes == (Note.SEPARATOR,)


def test_a_price_and_a_percentage_are_not_separators() -> None:
    text = "A sticker on the window reads 50% off, $5 each, in large yellow letters."
    assert verdict(text, {}) == Answer("danbooru:1", text, None)


def test_markup_and_quotation_marks_around_the_text_are_removed() -> None:
    assert verdict(f'"**{PLAIN}**"').caption == PLAIN
    assert verdict(f"# {PLAIN}").caption == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        PLAIN + " She has a bag and" + " a ribbon and a bow and" * 6,
        "A girl stands in the rain. " * 3,
        f"{PLAIN} {PLAIN}",
        "blue, blue, blue, blue, blue, blue, blue, blue",
        PLAIN + " She wears a hat, a red scarf, a red scarf, a red scarf, and boots.",
        PLAIN
        + " She wears "
        + ", ".join(f"a {c} scarf with a {c} hem" for c in ("red", "blue", "red", "blue") * 5)
        + ".",
        "A girl " + "ha-" * 200 + ".",
    ],
)
def test_repetition_is_a_loop(text: str) -> None:
    assert verdict(text, finish="length").reason == CaptionReason.LOOP


@pytest.mark.parametrize(
    "text",
    [
        'A girl laughs with her eyes closed, and "HA HA HA HA" fills the corner in red letters.',
        "One shelf holds cups, one shelf holds bowls, and one shelf holds a cat that watches a girl with blue hair.",
        "She is very, very small beside the door. On the left stands a girl with blue hair, and on the left wall "
        "hangs a clock.",
    ],
)
def test_a_little_repetition_is_accepted(text: str) -> None:
    assert verdict(text).reason is None


def test_finish_reasons_of_the_engine_are_used() -> None:
    assert verdict(PLAIN, finish="repetition").reason == CaptionReason.LOOP
    assert verdict(PLAIN, finish="content_filter").reason == CaptionReason.REFUSAL


@pytest.mark.parametrize("finish", ["length", "stop", None])
@pytest.mark.parametrize(
    "tail", [" She also wears a long", " Dr.", " Her coat is (as far as one can", ' A sign says "OPEN']
)
def test_a_truncated_answer_is_cut_to_its_last_whole_sentence(tail: str, finish: str | None) -> None:
    assert verdict(PLAIN + tail, finish=finish) == Answer("danbooru:1", PLAIN, None, (Note.CUT,))


@pytest.mark.parametrize(
    "text",
    ["A girl with blue hair stands under a clear umbrella on a wet", "A girl stands. Her blue hair is tied with a"],
)
def test_a_truncated_answer_with_too_few_words_left_is_rejected(text: str) -> None:
    assert verdict(text, finish="length").reason == CaptionReason.TRUNCATED


@pytest.mark.parametrize("end", ["!", "?", "...", "…", '."', ".”", ".)"])
def test_sentences_end_in_many_ways(end: str) -> None:
    text = f"{PLAIN} Over the door one can still read, in faded paint, the words of an old song{end}"
    assert verdict(text, finish="length") == Answer("danbooru:1", text, None)


def test_captions_are_neither_too_short_nor_too_long() -> None:
    assert verdict("A girl holds a cat.").reason == CaptionReason.TOO_SHORT
    assert verdict("A girl holds a black cat.").reason is None
    long = " ".join(caption for request, caption in GOOD if not request.tags.get("character"))
    assert verdict(long, {}).reason == CaptionReason.TOO_LONG
    assert verdict(" ".join(long.split()[:220]) + " end.", {}).reason == CaptionReason.TOO_LONG
    assert verdict(" ".join(long.split()[:219]) + " end.", {}).reason is None


def test_the_first_check_decides_the_reason() -> None:
    """Leaked tokens come before refusals, and these before other languages."""
    assert verdict("I'm sorry, je ne peux pas le faire avec les images </s>").reason == CaptionReason.TOKENS
    assert verdict("I'm sorry, je ne peux pas le faire avec les images").reason == CaptionReason.REFUSAL
    assert verdict("Je ne peux pas le faire avec les images et des").reason == CaptionReason.LANGUAGE


def test_a_caption_of_too_many_images_is_found_up_to_case_and_punctuation() -> None:
    captions = {f"danbooru:{n}": PLAIN.upper() if n % 2 else PLAIN.replace(".", "!") for n in range(4)}
    assert repeated_captions(captions) == set(captions)
    assert repeated_captions(captions | {"danbooru:4": "Another caption."}, limit=3) == set(captions)
    assert repeated_captions(captions, limit=4) == set()
