"""Every failure mode of a captioning model: caught where it is, not seen where it is not."""

import json
from pathlib import Path

import pytest

from captioner.answers import Limits, RepeatedCaptions, check
from captioner.requests import Answer, Note, Reason, Request

# One JSON object a line: a caption as it should be, and the tags of its picture.
GOOD = [
    (Request(f"good:{number}", row["tags"]), row["caption"])
    for number, row in enumerate(
        map(json.loads, Path(__file__).with_name("good_captions.jsonl").read_text(encoding="utf-8").splitlines())
    )
]
GIRL = {"special": ["1girl", "solo"], "general": ["blue hair", "green eyes", "umbrella"]}
PLAIN = "A girl with blue hair stands under a clear umbrella on a wet street. Neon signs glow behind her."


def verdict(text: str, tags: dict[str, list[str]] | None = None, finish: str | None = "stop") -> Answer:
    return check(text, finish, Request("danbooru:1", GIRL if tags is None else tags))


def special(*words: str) -> dict[str, list[str]]:
    return {"special": list(words)}


@pytest.mark.parametrize(("request_", "caption"), GOOD)
@pytest.mark.parametrize("finish", ["stop", "length", None])
def test_a_good_caption_passes_unchanged(request_: Request, caption: str, finish: str | None) -> None:
    assert check(caption, finish, request_) == Answer(request_.id, caption, None)


def test_there_are_good_captions_of_many_kinds() -> None:
    assert len(GOOD) >= 15
    assert len({caption for _, caption in GOOD}) == len(GOOD)


@pytest.mark.parametrize("text", ["", "   \n\t", "\n"])
def test_nothing_is_no_caption(text: str) -> None:
    assert verdict(text).reason == Reason.EMPTY


@pytest.mark.parametrize(
    "token", ["[IMG]", "[IMG_BREAK]", "[INST]", "[/INST]", "</s>", "<s>", "<|im_end|>", "<|", "[INST"]
)
def test_a_token_of_the_template_refuses_the_answer(token: str) -> None:
    assert verdict(f"{PLAIN} {token}").reason == Reason.TOKENS


@pytest.mark.parametrize("harmless", ["[3]", "<3", "|", "[img]ination", "A > B", "[OPEN]"])
def test_brackets_alone_leak_nothing(harmless: str) -> None:
    assert verdict(f"{PLAIN} Her phone shows {harmless} in white.").reason is None


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\u202e", "\ufffd", "\ue000", "\x7f", "\u200b"])
def test_what_cannot_be_printed_refuses_the_answer(character: str) -> None:
    assert verdict(PLAIN.replace("wet", f"we{character}t")).reason == Reason.CONTROL


def test_lines_and_emoji_can_be_printed() -> None:
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
    assert verdict(text, {}).reason == Reason.REFUSAL


@pytest.mark.parametrize(
    "text",
    [
        'A girl holds a card that says "I\'m sorry" and bows deeply in front of a closed door.',
        "An AI robot sits at a desk, and as an artist would, holds a brush over an empty canvas.",
        f"{PLAIN} The rain falls in thin lines over the empty crossing. I'm sorry to say it is late.",
        "A boy who is unable to reach the shelf stands on a stack of books. Nobody is there to help.",
    ],
)
def test_apologies_inside_a_picture_or_far_in_are_no_refusal(text: str) -> None:
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
def test_other_languages_than_english_are_refused(text: str) -> None:
    assert verdict(text).reason == Reason.LANGUAGE


@pytest.mark.parametrize(
    "text",
    [
        'A shop sign above the door reads "いらっしゃいませ本日限定大安売り" in red letters.',
        "A café table by the window holds a crème brûlée, a cup and a naïve drawing of a cat.",
        "A girl wears a yukata with a koi pattern on it, no shoes, and an obi tied at the back.",
    ],
)
def test_english_may_quote_and_borrow(text: str) -> None:
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
def test_openers_are_stripped_and_counted(opener: str, rest: str) -> None:
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
def test_preambles_are_stripped_and_counted(preamble: str) -> None:
    assert verdict(preamble + PLAIN) == Answer("danbooru:1", PLAIN, None, (Note.PREAMBLE,))


def test_preamble_and_opener_go_together() -> None:
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
def test_what_only_looks_like_an_opener_stays(text: str) -> None:
    assert verdict(text, {}).caption == text


def test_a_later_mention_of_the_image_is_only_counted() -> None:
    text = f"{PLAIN} The image has a cold blue tone."
    assert verdict(text) == Answer("danbooru:1", text, None, (Note.MENTIONS_IMAGE,))


@pytest.mark.parametrize("separator", ["|||", "%%", "$$", "%|||%", "|||||", "$$$$"])
def test_separators_never_stay_in_a_caption(separator: str) -> None:
    answer = verdict(PLAIN.replace(" on a wet", f" {separator} on a wet"))
    assert answer.caption is not None
    assert not any(s in answer.caption for s in ("|||", "%%", "$$"))
    assert answer.notes == (Note.SEPARATOR,)


def test_a_price_and_a_percentage_are_no_separators() -> None:
    text = "A sticker on the window reads 50% off, $5 each, in large yellow letters."
    assert verdict(text, {}) == Answer("danbooru:1", text, None)


def test_markup_and_quotation_marks_around_the_whole_are_dropped() -> None:
    assert verdict(f'"**{PLAIN}**"').caption == PLAIN
    assert verdict(f"# {PLAIN}").caption == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        PLAIN + " She has a bag and" + " a ribbon and a bow and" * 6,
        "A girl stands in the rain. " * 3,
        f"{PLAIN} {PLAIN}",
        "blue, blue, blue, blue, blue, blue, blue, blue",
        PLAIN
        + " She wears "
        + ", ".join(f"a {c} scarf with a {c} hem" for c in ("red", "blue", "red", "blue") * 5)
        + ".",
        "A girl " + "ha-" * 200 + ".",
    ],
)
def test_words_that_go_round_are_a_loop(text: str) -> None:
    assert verdict(text, finish="length").reason == Reason.LOOP


@pytest.mark.parametrize(
    "text",
    [
        'A girl laughs with her eyes closed, and "HA HA HA HA" fills the corner in red letters.',
        "One shelf holds cups, one shelf holds bowls, and one shelf holds a cat that watches a girl with blue hair.",
        "She is very, very small beside the door. On the left stands a girl with blue hair, and on the left wall "
        "hangs a clock.",
    ],
)
def test_a_little_repetition_is_style(text: str) -> None:
    assert verdict(text).reason is None


def test_a_loop_that_the_engine_stopped_is_a_loop() -> None:
    assert verdict(PLAIN, finish="repetition").reason == Reason.LOOP
    assert verdict(PLAIN, finish="content_filter").reason == Reason.REFUSAL


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
def test_a_truncated_answer_with_too_little_left_is_refused(text: str) -> None:
    assert verdict(text, finish="length").reason == Reason.TRUNCATED


@pytest.mark.parametrize("end", ["!", "?", "...", "…", '."', ".”", ".)"])
def test_sentences_end_in_many_ways(end: str) -> None:
    text = f"{PLAIN} Over the door one can still read, in faded paint, the words of an old song{end}"
    assert verdict(text, finish="length") == Answer("danbooru:1", text, None)


def test_captions_are_neither_too_short_nor_too_long() -> None:
    assert verdict("A girl.").reason == Reason.TOO_SHORT
    long = " ".join(caption for request, caption in GOOD if not request.tags.get("character"))
    assert verdict(long, {}).reason == Reason.TOO_LONG
    assert check(long, "stop", Request("danbooru:1", {}), Limits(most_words=1000)).caption == long


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("A girl named Sakura stands under an umbrella in the rain.", GIRL),
        ("Hatsune Miku stands under an umbrella on a wet street.", GIRL),
        ("A girl that resembles Rem from Re:Zero holds an umbrella in the rain.", GIRL),
        ("A girl who looks like Asuna holds a sword over her head.", {**GIRL, "character": ["lisbeth (sao)"]}),
        ("A girl in the style of Makoto Shinkai stands under an umbrella.", GIRL),
        ("Two friends, Nadeshiko and Rin, sit by a fire at the lake.", {"character": ["shima rin"]}),
    ],
)
def test_a_name_that_is_in_no_tag_is_invented(text: str, tags: dict[str, list[str]]) -> None:
    assert verdict(text, tags).reason == Reason.NAME


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("Shima Rin and Nadeshiko sit by a fire.", {"character": ["shima rin", "kagamihara nadeshiko"]}),
        ("A girl called Miku Hatsune sings on a stage.", {"general": ["hatsune miku"]}),  # uncategorised dumps
        ("A girl, Toosaka Rin's rival, crosses her arms and frowns.", {"character": ["tohsaka rin"]}),
        ("On the sand, Son Goku from Dragon Ball jumps.", {"character": ["son gokuu"], "copyright": ["dragonball"]}),
        ("Before dawn, Spider-Man hangs from a lamp.", {"character": ["spider-man"]}),
        ("A girl wears a T-shirt, Mary Janes and a Gothic Lolita dress with an A-line skirt.", {}),
        ("A neon sign reads OPEN above a TV that shows the Moon.", {}),
        ('A poster says "Welcome Home, Captain Tanaka" above the door.', {}),
        ("A poster says 'Don't Forget Your Umbrella' above the door.", {}),
        ("A banner with ‘Grand Opening’ hangs over the street.", {}),
        ("A girl thinks: Maybe tomorrow. Her window shows Tokyo Tower and Mount Fuji.", {}),
        ("— Evening falls over the harbour, and small boats return to the pier.", {}),
        ("Above it all, Élise waves from a balcony with both hands.", {"character": ["elise (fire emblem)"]}),
    ],
)
def test_names_of_the_tags_and_ordinary_capitals_are_not_invented(text: str, tags: dict[str, list[str]]) -> None:
    assert verdict(text, tags) == Answer("danbooru:1", text, None)


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("Two girls stand under one umbrella on a wet street.", special("1girl", "solo")),
        ("A group of smiling girls stands under the roof of a bus stop.", special("1girl")),
        ("Three young women sit on a bench and share a box of sweets.", special("2girls", "multiple girls")),
        ("Two girls sit on a bench under a bare tree in winter.", special("4girls", "multiple girls")),
        ("A lone girl sits on a bench under a bare tree in winter.", special("2girls", "multiple girls")),
        ("A young woman with a sword looks over her shoulder at the sea.", special("1boy", "solo")),
        ("A man with a sword looks over his shoulder at the sea.", special("1girl", "solo")),
        ("A girl in a white dress stands on the shore of a frozen lake.", special("no humans")),
        ("A dozen girls run along the beach toward the pier.", special("5girls")),
        ("A trio of boys runs along the beach toward the pier.", special("2boys", "multiple boys")),
        ("5 boys run along the beach toward the old pier.", special("3boys")),
    ],
)
def test_other_people_than_the_tags_count_are_a_contradiction(text: str, tags: dict[str, list[str]]) -> None:
    assert verdict(text, tags).reason == Reason.PEOPLE


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("Two cats watch a girl who pours milk into two bowls.", special("1girl")),
        ("A girl looks at a poster of two girls on the wall of a station.", special("1girl")),
        ("A girl sits beside the statue of a man in a quiet park.", special("1girl")),
        ("A girl dressed like a boy leans on a wall and whistles.", special("1girl")),
        ("A girl's hat lies on an empty bench beside a school bag.", special("no humans")),
        ("A gingerbread man and a toy train stand on a snowy shelf.", special("no humans")),
        ("Two girls hug in front, and a third waves from the stairs behind.", special("3girls")),
        ("Two girls hold hands while one girl carries the bags.", special("3girls")),
        ("Nine girls pose on the steps of a school in winter.", special("6+girls", "multiple girls")),
        ("Four girls pose on the steps of a school in winter.", special("multiple girls")),
        (
            "Three girls with the same face look in three directions.",
            {**special("1girl"), "general": ["multiple views"]},
        ),
        ("A girl in a frilled dress turns around and smiles shyly.", {**special("1boy"), "general": ["otoko no ko"]}),
        ("Two girls stand under an umbrella in the rain tonight.", {"general": ["umbrella"]}),  # nobody counted
        ("A 16-year-old girl in a 3D game rides a bicycle downhill.", special("1girl")),
        ("A 3D girl walks past a shelf of toys toward the light.", special("1girl")),
        ("A woman with rabbit ears pours tea for the guests.", special("1other")),
        ("A woman in a schoolgirl uniform rides a bicycle downhill.", special("1girl", "solo")),
    ],
)
def test_people_that_may_be_there_are_no_contradiction(text: str, tags: dict[str, list[str]]) -> None:
    assert verdict(text, tags) == Answer("danbooru:1", text, None)


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("A girl with long blonde hair stands under an umbrella.", "blue hair"),
        ("A silver-haired girl stands under an umbrella in the rain.", "red hair"),
        ("A girl stands in the rain, and her hair is a deep green.", "pink hair"),
        ("A girl with long, wavy, flowing red hair stands in the rain.", "light blue hair"),
    ],
)
def test_another_hair_colour_is_a_contradiction(text: str, tag: str) -> None:
    assert verdict(text, {"special": ["1girl"], "general": [tag]}).reason == Reason.HAIR


@pytest.mark.parametrize(
    ("text", "general"),
    [
        ("A girl with turquoise hair stands under an umbrella.", ["blue hair"]),
        ("A girl with dark navy hair stands under an umbrella.", ["black hair"]),
        ("A girl with auburn hair stands under an umbrella.", ["blonde hair"]),  # not a colour we know
        ("A girl with a red hair ribbon stands under an umbrella.", ["blue hair"]),
        ("A girl with a red hairband and a yellow hat holds an umbrella.", ["blue hair"]),
        ("A girl with red hair and green tips stands in the rain.", ["blue hair", "gradient hair"]),
        ("A girl with red hair stands under an umbrella.", ["long hair"]),
        ("A girl with a red umbrella and long hair stands in the rain.", ["blue hair"]),
        ("A girl stands in the rain, and her hair is tied with red string.", ["blue hair"]),
        ("A girl with black-and-red hair stands in the rain.", ["black hair"]),
        ("A girl in a hat that is red, and long hair, stands there.", ["blue hair"]),
        ("A girl in a yellow dress lets her hair hang over one eye.", ["blue hair"]),
    ],
)
def test_near_colours_and_coloured_things_in_hair_are_no_contradiction(text: str, general: list[str]) -> None:
    assert verdict(text, {"special": ["1girl"], "general": general}) == Answer("danbooru:1", text, None)


def test_of_several_people_no_colour_is_certain() -> None:
    tags = {"special": ["2girls"], "general": ["blue hair"]}
    assert verdict("Two girls stand in the rain, and one has red hair and green eyes.", tags).reason is None


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("A girl with large, bright red eyes holds an umbrella.", "green eyes"),
        ("A blue-eyed girl holds an umbrella on a wet street.", "yellow eyes"),
        ("A girl holds an umbrella, and her eyes are green.", "purple eyes"),
    ],
)
def test_another_eye_colour_is_a_contradiction(text: str, tag: str) -> None:
    assert verdict(text, {"special": ["1girl"], "general": [tag]}).reason == Reason.EYES


@pytest.mark.parametrize(
    ("text", "general"),
    [
        ("A girl with amber eyes holds an umbrella on a wet street.", ["yellow eyes"]),
        ("A girl with blue-green eyes holds an umbrella in the rain.", ["blue eyes"]),
        ("A girl with hazel eyes holds an umbrella on a wet street.", ["brown eyes"]),
        ("A girl with one red and one blue eye holds an umbrella.", ["heterochromia", "red eyes", "blue eyes"]),
        ("A girl with blue eye shadow and closed eyes holds an umbrella.", ["green eyes"]),
        ("A girl in a red coat keeps her eyes closed in the rain.", ["green eyes"]),
        ("A girl with red eyes holds an umbrella on a wet street.", ["closed eyes"]),
    ],
)
def test_near_eye_colours_are_no_contradiction(text: str, general: list[str]) -> None:
    assert verdict(text, {"special": ["1girl"], "general": general}) == Answer("danbooru:1", text, None)


def test_the_first_detector_names_the_reason() -> None:
    """A refusal in French that is cut off is a leak, if a token leaked; then a refusal, then a language."""
    assert verdict("I'm sorry, je ne peux pas le faire avec les images </s>").reason == Reason.TOKENS
    assert verdict("I'm sorry, je ne peux pas le faire avec les images").reason == Reason.REFUSAL
    assert verdict("Je ne peux pas le faire avec les images et des").reason == Reason.LANGUAGE


def test_a_caption_of_many_images_is_refused_once_it_is_known() -> None:
    repeated = RepeatedCaptions(most=2)
    answers = [Answer(f"danbooru:{n}", PLAIN.upper() if n % 2 else PLAIN, None) for n in range(4)]
    assert [repeated.check(answer).reason for answer in answers] == [None, None, Reason.REPEATED, Reason.REPEATED]
    assert repeated.repeated() == {f"danbooru:{n}" for n in range(4)}


def test_different_captions_failures_and_a_row_done_again_are_no_repetition() -> None:
    repeated = RepeatedCaptions(most=1)
    for answer in (
        Answer("danbooru:1", PLAIN, None),
        Answer("danbooru:1", PLAIN, None),
        Answer("danbooru:2", "Another caption.", None),
        Answer("danbooru:3", None, Reason.EMPTY),
        Answer("danbooru:4", None, Reason.EMPTY),
    ):
        assert repeated.check(answer) is answer
    assert repeated.repeated() == set()


def test_a_row_that_was_captioned_anew_counts_for_its_new_caption_only() -> None:
    repeated = RepeatedCaptions(most=1)
    repeated.check(Answer("danbooru:1", PLAIN, None))
    repeated.check(Answer("danbooru:1", "Another caption.", None))
    assert repeated.check(Answer("danbooru:2", PLAIN, None)).reason is None
