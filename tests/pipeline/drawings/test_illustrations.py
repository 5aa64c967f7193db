"""Drawn pictures show what their tags say."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.drawings.illustrations import COLOURS, Illustration, compose, general_tags, subject
from pipeline.drawings.painting import draw, encode
from pipeline.drawings.shapes import PATTERNS, SHAPES


def decoded(scene: Illustration) -> Image.Image:
    return Image.open(io.BytesIO(encode(draw(scene), scene))).convert("RGB")


def most_common_colour(picture: Image.Image) -> str:
    """The main colour, found by counting saturated pixels by nearest hue."""
    names = ["red", "orange", "yellow", "green", "aqua", "blue", "purple", "pink"]
    hues = np.array([0, 28, 52, 120, 180, 220, 275, 325])
    hsv = np.asarray(picture.convert("HSV"), dtype=np.float64).reshape(-1, 3) / 255
    saturated = hsv[(hsv[:, 1] > 0.45) & (hsv[:, 2] > 0.35), 0] * 360
    apart = np.abs((saturated[:, None] - hues + 180) % 360 - 180)
    return names[int(np.bincount(apart.argmin(axis=1), minlength=8).argmax())]


def test_counting_saturated_pixels_finds_the_main_colour_in_99_of_100_pictures() -> None:
    scenes = [compose(7, index) for index in range(200)]
    right = sum(most_common_colour(decoded(scene)) == scene.main.colour for scene in scenes)
    assert right >= 198


def test_files_depend_only_on_seed_and_index() -> None:
    def files(seed: int) -> list[bytes]:
        return [encode(draw(compose(seed, index)), compose(seed, index)) for index in range(12)]

    assert files(1) == files(1)
    assert not set(files(1)) & set(files(2))


def test_sides_formats_and_subjects_cover_the_documented_ranges() -> None:
    scenes = [compose(0, index) for index in range(2000)]
    for scene in scenes:
        assert 0.5 <= scene.width / scene.height <= 2
        assert 96 <= min(scene.width, scene.height) <= 224
        assert 0.46 <= scene.main.span / min(scene.width, scene.height) <= 0.86
    assert {scene.file_type for scene in scenes} == {"jpg", "png", "webp"}
    assert {scene.width / scene.height for scene in scenes} >= {0.5, 1.0, 2.0}
    assert {subject(scene.main) for scene in scenes} == {f"{colour}_{kind}" for colour in COLOURS for kind in SHAPES}


@pytest.mark.parametrize("kind", SHAPES)
def test_an_upright_object_has_the_length_and_position_of_its_thing(kind: str) -> None:
    scene = next(s for s in (compose(0, index) for index in range(500)) if s.artist == "quiet_radish")  # no outline
    main = replace(scene.main, kind=kind, colour="blue", hsv=COLOURS["blue"], span=80, x=70, y=60, tilt=0)
    white = (255, 255, 255)
    scene = replace(scene, width=140, height=120, main=main, extras=(), background="white", tones=(white, white))
    picture = draw(replace(scene, flaw="", quality=0.2))  # a quality without shading
    found = np.argwhere((np.asarray(picture) < 250).any(axis=2))
    (top, left), (bottom, right) = found.min(axis=0), found.max(axis=0)
    assert max(bottom - top, right - left) == pytest.approx(80, abs=2)
    assert ((top + bottom) / 2, (left + right) / 2) == pytest.approx((60, 70), abs=1.5)


def test_an_object_is_on_the_side_its_place_tag_names_or_near_the_centre() -> None:
    for scene in (compose(3, index) for index in range(500)):
        x, y = scene.main.x / scene.width - 0.5, scene.main.y / scene.height - 0.5
        off = {"on_the_left": -x, "on_the_right": x, "at_the_top": -y, "at_the_bottom": y}
        if scene.place == "centre":
            assert np.hypot(x, y) < 0.35
        else:
            assert off[scene.place] > 0.1


def test_every_pattern_gives_a_different_picture() -> None:
    scene = compose(0, 0)
    pictures = {draw(replace(scene, main=replace(scene.main, pattern=pattern))).tobytes() for pattern in PATTERNS}
    assert len(pictures) == len(PATTERNS)


def test_other_objects_are_small_and_have_other_colours() -> None:
    scenes = [scene for scene in (compose(5, index) for index in range(600)) if scene.extras]
    assert 600 / 4 < len(scenes) < 600 / 2.5
    for scene in scenes:
        colours = [thing.colour for thing in (scene.main, *scene.extras)]
        assert len(set(colours)) == len(colours) <= 4
        assert sum(extra.span**2 for extra in scene.extras) < 0.5 * scene.main.span**2
        assert "multiple_objects" in general_tags(scene)
