"""Main colours and kinds of objects, found in painted pictures whose colour and kind are known."""

import colorsys

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.drawings.illustrations import compose
from pipeline.drawings.painting import draw
from trainer.evaluation.coloured_objects import (
    COLOUR_HUES,
    Agreement,
    colour_agreement,
    coloured_object,
    main_colour,
    outline,
    shape_agreement,
)

Picture = NDArray[np.uint8]


def rgb(hue: float, saturation: float = 0.8, value: float = 0.9) -> tuple[int, ...]:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))


def square(colour: tuple[int, ...], ground: tuple[int, ...] = (240, 240, 235), side: int = 24) -> Picture:
    picture = np.full((64, 64, 3), ground, dtype=np.uint8)
    picture[20 : 20 + side, 20 : 20 + side] = colour
    return picture


def disc(radius: int, y: int = 32, x: int = 32, colour: tuple[int, int, int] = (230, 20, 20)) -> Picture:
    picture = np.full((64, 64, 3), 240, np.uint8)
    rows, columns = np.mgrid[:64, :64]
    picture[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = colour
    return picture


def bar(length: int, width: int = 4) -> Picture:
    picture = np.full((64, 64, 3), 240, np.uint8)
    picture[32 - width // 2 : 32 + width // 2, 32 - length // 2 : 32 + length // 2] = (20, 20, 230)
    return picture


def test_an_object_is_a_single_tag_of_a_colour_and_one_word() -> None:
    assert coloured_object(("solo", "Red star", "white background")) == ("red", "star")
    assert coloured_object(("red star", "blue moon")) is None
    assert coloured_object(("large", "red hot star", "infrared star")) is None


# --- Colour ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(COLOUR_HUES))
def test_a_square_has_the_colour_it_was_painted_in(name: str) -> None:
    for jitter in (-8, 0, 8):
        assert main_colour(square(rgb(COLOUR_HUES[name] + jitter))) == name


def test_red_is_on_both_sides_of_hue_zero() -> None:
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
def test_pale_dark_and_grey_grounds_do_not_count(muted: tuple[int, ...]) -> None:
    assert main_colour(square(muted)) is None
    assert main_colour(square(rgb(275), ground=muted, side=8)) == "purple"


def test_a_few_pixels_of_speckle_are_not_a_colour() -> None:
    assert main_colour(square(rgb(0), side=4)) is None  # 16 of 4,096 pixels: 0.39%
    assert main_colour(square(rgb(0), side=5)) == "red"  # 0.61%


def test_colour_agreement_counts_pictures_that_have_the_colour_of_their_own_prompt() -> None:
    pictures = [square(rgb(0)), square(rgb(220)), square(rgb(52)), square((200, 200, 200))]
    found = colour_agreement(["red", "blue", "green", "pink"], pictures)
    assert found == Agreement(hits=2, total=4, share=0.5, chance=0.125)
    with pytest.raises(ValueError, match="shorter"):
        colour_agreement(["red"], pictures)


# --- Shape ----------------------------------------------------------------------------------------------------------


def test_an_outline_does_not_depend_on_the_place_or_the_colour_of_the_object() -> None:
    for other in (disc(12, 20, 44), disc(12, colour=(20, 200, 40))):
        np.testing.assert_allclose(outline(other), outline(disc(12)), atol=1e-6)
    assert np.abs(outline(disc(20)) - outline(disc(10))).mean() < 0.03  # and hardly on its size
    assert np.abs(outline(bar(40)) - outline(disc(10))).mean() > 0.1
    assert not outline(np.full((64, 64, 3), 240, np.uint8)).any()


def test_the_nearest_outline_names_the_kind() -> None:
    known = [pair for n in range(8) for pair in ((disc(8 + n), "ball"), (bar(24 + 4 * n), "stick"))]
    found = shape_agreement(known, ["ball", "ball", "stick"], [disc(9, 25, 30), bar(30), bar(46)])
    assert found is not None
    assert (found.hits, found.total, found.share, found.chance, found.judge) == (2, 3, 2 / 3, 0.5, 1.0)


def test_one_known_picture_in_five_tests_the_others() -> None:
    known = [(disc(8 + n), "ball") if n % 2 else (bar(24 + 4 * n), "stick") for n in range(10)]
    mislabelled = [(picture, "ball" if n == 5 else kind) for n, (picture, kind) in enumerate(known)]
    mislabelled[5] = (known[4][0], "ball")  # a stick that is called a ball, at one of the two tested places
    found = shape_agreement(mislabelled, ["stick"], [bar(30)])
    assert found is not None
    assert (found.judge, found.hits) == (0.5, 1)


def test_shapes_are_not_measured_if_too_few_pictures_or_kinds_are_known() -> None:
    assert shape_agreement([(disc(9), "ball")] * 20, ["ball"], [disc(9)]) is None
    assert shape_agreement([(disc(9), "ball"), (bar(30), "stick")] * 4, ["ball"], [disc(9)]) is None


# --- Drawn pictures -------------------------------------------------------------------------------------------------


def test_colour_and_kind_of_drawn_pictures_are_found() -> None:
    """A blind guess of the 12 kinds is right on 8%; with thousands of known pictures the accuracy is 95%."""
    scenes = [compose(seed=4, index=index) for index in range(330)]
    pictures = [np.asarray(draw(scene).reduce(4)) for scene in scenes]
    colours = colour_agreement([scene.main.colour for scene in scenes], pictures)
    assert colours.share >= 0.95, colours
    known = [(pixels, scene.main.kind) for pixels, scene in zip(pictures, scenes, strict=True) if not scene.extras]
    assert len({kind for _, kind in known}) == 12
    shapes = shape_agreement(known, [known[0][1]], [known[0][0]])
    assert shapes is not None
    assert shapes.judge >= 0.9, shapes
