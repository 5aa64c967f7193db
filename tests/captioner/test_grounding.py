"""Names and colours in a caption against the tags of its picture."""

import pytest

from captioner.answers import check
from captioner.requests import Answer, CaptionReason, CaptionRequest

GIRL = {"special": ["1girl", "solo"], "general": ["blue hair", "green eyes", "umbrella"]}


def verdict(text: str, tags: dict[str, list[str]]) -> Answer:
    return check(text, "stop", CaptionRequest("danbooru:1", tags))


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
    assert verdict(text, tags).reason == CaptionReason.NAME


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
def test_names_in_tags_and_ordinary_capitals_are_not_invented(text: str, tags: dict[str, list[str]]) -> None:
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
def test_another_hair_colour_contradicts_the_tags(text: str, tag: str) -> None:
    assert verdict(text, {"special": ["1girl"], "general": [tag]}).reason == CaptionReason.HAIR


@pytest.mark.parametrize(
    ("text", "general"),
    [
        ("A girl with turquoise hair stands under an umbrella.", ["blue hair"]),
        ("A girl with dark navy hair stands under an umbrella.", ["black hair"]),
        ("A girl with auburn hair stands under an umbrella.", ["blonde hair"]),  # not in our table
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
def test_near_colours_and_coloured_things_in_hair_are_accepted(text: str, general: list[str]) -> None:
    assert verdict(text, {"special": ["1girl"], "general": general}) == Answer("danbooru:1", text, None)


def test_colours_of_several_people_are_not_compared() -> None:
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
def test_another_eye_colour_contradicts_the_tags(text: str, tag: str) -> None:
    assert verdict(text, {"special": ["1girl"], "general": [tag]}).reason == CaptionReason.EYES


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
def test_near_eye_colours_are_accepted(text: str, general: list[str]) -> None:
    assert verdict(text, {"special": ["1girl"], "general": general}) == Answer("danbooru:1", text, None)
