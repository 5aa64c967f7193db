import colorsys

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.drawings.illustrations import compose
from pipeline.drawings.painting import draw
from trainer.evaluation.agreement import COLOUR_HUES, Agreement, colour_agreement, main_colour, prompted_colour

Picture = NDArray[np.uint8]


def rgb(hue: float, saturation: float = 0.8, value: float = 0.9) -> tuple[int, ...]:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))


def square(colour: tuple[int, ...], ground: tuple[int, ...] = (240, 240, 235), side: int = 24) -> Picture:
    picture = np.full((64, 64, 3), ground, dtype=np.uint8)
    picture[20 : 20 + side, 20 : 20 + side] = colour
    return picture


@pytest.mark.parametrize("name", list(COLOUR_HUES))
def test_a_square_has_the_colour_it_was_painted_in(name: str) -> None:
    for jitter in (-8, 0, 8):
        assert main_colour(square(rgb(COLOUR_HUES[name] + jitter))) == name


def test_red_lies_on_both_sides_of_hue_zero() -> None:
    picture = square(rgb(355))
    picture[:10, :10] = rgb(5)
    assert main_colour(picture) == "red"


def test_the_larger_area_wins() -> None:
    picture = square(rgb(220), side=24)
    picture[:10, :10] = rgb(0)
    assert main_colour(picture) == "blue"


@pytest.mark.parametrize(
    "muted", [rgb(120, saturation=0.4), rgb(120, value=0.3), (128, 128, 128), (255, 255, 255), (0, 0, 0)]
)
def test_pale_dark_and_grey_grounds_have_no_say(muted: tuple[int, ...]) -> None:
    assert main_colour(square(muted)) is None
    assert main_colour(square(rgb(275), ground=muted, side=8)) == "purple"


def test_a_few_pixels_of_speckle_are_no_colour() -> None:
    assert main_colour(square(rgb(0), side=4)) is None  # 16 of 4,096 pixels: 0.39%
    assert main_colour(square(rgb(0), side=5)) == "red"  # 0.61%


@pytest.mark.parametrize(
    ("prompt", "colour"),
    [
        ("a large Red star, blue moon", "red"),
        ("ball, purple", "purple"),
        ("infrared bluebird", None),
        ("", None),
    ],
)
def test_the_first_whole_colour_word_is_what_was_asked_for(prompt: str, colour: str | None) -> None:
    assert prompted_colour(prompt) == colour


def test_agreement_counts_pictures_that_answer_their_own_prompt() -> None:
    prompts = ["red ball", "blue ball", "green ball", "a pink cat"]
    pictures = [square(rgb(0)), square(rgb(220)), square(rgb(52)), square((200, 200, 200))]
    assert colour_agreement(prompts, pictures) == Agreement(hits=2, total=4, share=0.5, chance=0.125)


def test_prompts_that_cannot_be_judged_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'a cat'.*red, orange"):
        colour_agreement(["red ball", "a cat"], [square(rgb(0))] * 2)
    with pytest.raises(ValueError, match="1 prompts and 2 pictures"):
        colour_agreement(["red ball"], [square(rgb(0))] * 2)
    with pytest.raises(ValueError, match="0 prompts"):
        colour_agreement([], [])


def test_the_rule_finds_the_main_colour_of_drawn_pictures() -> None:
    scenes = [compose(seed=5, index=i) for i in range(100)]
    found = [main_colour(np.asarray(draw(scene))) for scene in scenes]
    hits = sum(colour == scene.main.colour for colour, scene in zip(found, scenes, strict=True))
    assert hits >= 95
