"""Kinds of objects by their outlines: of drawn pictures, whose kinds are known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.drawings.illustrations import compose
from pipeline.drawings.painting import draw, encode
from pipeline.pictures.crops import Crop, square_crop
from trainer.evaluation.drawn_shapes import Judge, coloured_object, outline

Picture = NDArray[np.uint8]


def disc(radius: int, y: int = 32, x: int = 32, colour: tuple[int, int, int] = (230, 20, 20)) -> Picture:
    picture = np.full((64, 64, 3), 240, np.uint8)
    rows, columns = np.mgrid[:64, :64]
    picture[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = colour
    return picture


def bar(length: int, width: int = 4) -> Picture:
    picture = np.full((64, 64, 3), 240, np.uint8)
    picture[32 - width // 2 : 32 + width // 2, 32 - length // 2 : 32 + length // 2] = (20, 20, 230)
    return picture


def test_an_outline_is_the_same_wherever_the_object_lies_and_whatever_its_colour() -> None:
    for other in (disc(12, 20, 44), disc(12, colour=(20, 200, 40))):
        np.testing.assert_allclose(outline(other), outline(disc(12)), atol=1e-6)
    assert np.abs(outline(disc(20)) - outline(disc(10))).mean() < 0.03  # nor does its size count
    assert np.abs(outline(bar(40)) - outline(disc(10))).mean() > 0.1
    assert not outline(np.full((64, 64, 3), 240, np.uint8)).any()


def test_the_nearest_outline_names_the_kind_and_agreement_is_counted() -> None:
    known = [picture for n in range(8) for picture in (disc(8 + n), bar(24 + 4 * n))]
    judge = Judge.of(known, ["ball", "stick"] * 8)
    assert judge.right == 1
    assert judge.named([disc(13, 25, 30), bar(46)]) == ["ball", "stick"]
    found = judge.agreement(["ball", "ball", "stick"], [disc(9), bar(30), bar(34)])
    assert (found.hits, found.total, found.chance, found.judge) == (2, 3, 0.5, 1.0)


def test_pictures_that_cannot_make_a_judge_are_refused() -> None:
    with pytest.raises(ValueError, match="of 1 kinds"):
        Judge.of([disc(9)] * 20, ["ball"] * 20)
    with pytest.raises(ValueError, match="4 pictures"):
        Judge.of([disc(9), bar(30)] * 2, ["ball", "stick"] * 2)
    judge = Judge.of([disc(9), bar(30)] * 8, ["ball", "stick"] * 8)
    with pytest.raises(ValueError, match="one kind a picture"):
        judge.agreement(["ball"], [disc(9)] * 2)


def test_one_tag_of_a_colour_and_a_kind_is_an_object() -> None:
    assert coloured_object(("solo", "Red star", "white background")) == ("red", "star")
    assert coloured_object(("red star", "blue moon")) is None
    assert coloured_object(("large", "red hot star", "infrared star")) is None


def test_the_judge_is_right_on_four_of_five_drawn_pictures_that_it_has_not_seen() -> None:
    """12 kinds, so that a blind guess is right on one of twelve; with thousands of known pictures it is 95%."""
    pictures, kinds = [], []
    for index in range(600):
        scene = compose(seed=4, index=index)
        crop = square_crop(encode(draw(scene), scene), 64, 0.5, 0.5)
        if not scene.extras and isinstance(crop, Crop):
            pictures.append(crop.pixels_HWC)
            kinds.append(scene.main.kind)
    assert len(set(kinds)) == 12
    assert Judge.of(pictures, kinds).right >= 0.8
