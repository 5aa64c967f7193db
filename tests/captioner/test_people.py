"""The number of girls and boys in a caption against the tags of its picture."""

import pytest

from captioner.answers import check
from captioner.requests import Answer, CaptionReason, CaptionRequest


def verdict(text: str, tags: dict[str, list[str]]) -> Answer:
    return check(text, "stop", CaptionRequest("danbooru:1", tags))


def special(*words: str) -> dict[str, list[str]]:
    return {"special": list(words)}


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
def test_other_numbers_of_people_contradict_the_tags(text: str, tags: dict[str, list[str]]) -> None:
    assert verdict(text, tags).reason == CaptionReason.PEOPLE


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
def test_people_that_may_be_in_the_picture_are_accepted(text: str, tags: dict[str, list[str]]) -> None:
    assert verdict(text, tags) == Answer("danbooru:1", text, None)
