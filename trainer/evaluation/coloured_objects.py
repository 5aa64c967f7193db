"""Do pictures show the coloured object of their prompt ("red star")? For pictures of one vivid object on a muted
ground, such as the drawn sample dataset's.

The colour is found by a rule on pixels, the kind by the nearest outline among pictures of known kind. Neither shares
code with the model or with what draws the sample dataset, so that neither can flatter the other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.evaluation.rows import center_crops, evaluation_rows
from trainer.samples.row_index import Selection

Picture = NDArray[np.uint8]  # (H, W, 3)

# Hue in degrees of where people place these words, which is not evenly spaced.
COLOUR_HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 120, "aqua": 180, "blue": 220, "purple": 275, "pink": 325}
_COLOURED = re.compile(rf"({'|'.join(COLOUR_HUES)}) (\w+)", re.IGNORECASE)

# Excludes pastel grounds, greys, outlines and shadows.
_MIN_SATURATION = 0.45
_MIN_VALUE = 0.35
_MIN_SHARE = 0.005  # of the pixels: fewer are speckle or the seam of an outline

_SIDE = 16  # pixels of an outline
_REACH = 2.5  # half the side of the outlined square, in standard deviations of the object's pixels
_REFERENCES = 2000  # pictures of the selection whose kinds are known
_TEST_EVERY = 5  # one reference in 5 measures the classifier's accuracy


@dataclass(frozen=True)
class Agreement:
    hits: int
    total: int
    share: float
    chance: float  # share that a blind guess of one answer reaches


@dataclass(frozen=True)
class ShapeAgreement(Agreement):
    judge: float  # accuracy of the shape classifier on pictures whose kind is known


def coloured_object(tags: Sequence[str]) -> tuple[str, str] | None:
    """Colour and kind if exactly one tag is a colour and one more word, such as "red star"."""
    found = [match for tag in tags if (match := _COLOURED.fullmatch(tag))]
    return (found[0][1].lower(), found[0][2].lower()) if len(found) == 1 else None


def object_agreement(
    selection: Selection, side: int, objects: Sequence[tuple[str, str | None]], pictures: Sequence[Picture]
) -> tuple[Agreement, ShapeAgreement | None]:
    """objects: the colour and kind that each picture should show; if a kind is None, shapes are not measured.

    Kinds are known from the selection's own pictures of one coloured object.
    """
    kinds = [kind for _, kind in objects if kind]
    known = []
    if len(kinds) == len(objects):
        for row, pixels in center_crops(selection, evaluation_rows(selection, _REFERENCES, 0.0), side):
            if found := coloured_object(row.general):
                known.append((pixels, found[1]))
    return colour_agreement([colour for colour, _ in objects], pictures), shape_agreement(known, kinds, pictures)


# --- Colour ---------------------------------------------------------------------------------------------------------


def colour_agreement(colours: Sequence[str], pictures: Sequence[Picture]) -> Agreement:
    """Counts the pictures whose main colour is the one of the prompt. colours: keys of COLOUR_HUES, at least one."""
    hits = sum(main_colour(picture) == colour for picture, colour in zip(pictures, colours, strict=True))
    return Agreement(hits, len(colours), hits / len(colours), 1 / len(COLOUR_HUES))


def main_colour(picture: Picture) -> str | None:
    """The colour nearest in hue to most vivid pixels; None if there are too few of them."""
    hue, _, _ = _to_hsv(picture.reshape(-1, 3))
    votes_V = hue[vivid(picture).reshape(-1)]
    if len(votes_V) < _MIN_SHARE * len(hue):
        return None
    centres = np.array(list(COLOUR_HUES.values()))
    distance = np.abs((votes_V[:, None] - centres + 180) % 360 - 180)
    counts = np.bincount(distance.argmin(axis=1), minlength=len(centres))
    return list(COLOUR_HUES)[int(counts.argmax())]


def vivid(picture: Picture) -> NDArray[np.bool_]:
    """Mask (H, W) of the saturated, bright pixels, which are those of the object."""
    _, saturation, value = _to_hsv(picture.reshape(-1, 3))
    mask: NDArray[np.bool_] = (saturation > _MIN_SATURATION) & (value > _MIN_VALUE)
    return mask.reshape(picture.shape[:2])


def _to_hsv(rgb_N3: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Hue in degrees [0, 360), saturation and value in [0, 1] of each pixel: the hexagonal HSV of Smith 1978."""
    r, g, b = (rgb_N3.astype(np.float32) / 255).T
    value = np.maximum(np.maximum(r, g), b)
    chroma = value - np.minimum(np.minimum(r, g), b)
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.select([value == r, value == g], [((g - b) / safe) % 6, (b - r) / safe + 2], (r - g) / safe + 4)
    return hue * 60 % 360, chroma / np.where(value > 0, value, 1), value


# --- Shape ----------------------------------------------------------------------------------------------------------


def shape_agreement(
    known: Sequence[tuple[Picture, str]], kinds: Sequence[str], pictures: Sequence[Picture]
) -> ShapeAgreement | None:
    """Counts the pictures that show the kind of their prompt: that of the nearest outline of the known pictures.

    Every fifth known picture measures the accuracy of this classifier instead. None if fewer than 10 pictures, or only
    one kind, are known.
    """
    if len({kind for _, kind in known}) < 2 or len(known) < 2 * _TEST_EVERY:
        return None
    outlines_NP = np.stack([outline(picture) for picture, _ in known])
    kind_N = np.array([kind for _, kind in known])
    test_N = np.arange(len(known)) % _TEST_EVERY == 0
    known_NP, known_kind_N = outlines_NP[~test_N], kind_N[~test_N]

    def nearest_kinds(outlines_MP: NDArray[np.float32]) -> NDArray[np.str_]:
        # Squared distances, without the term that is the same for all known outlines.
        distance_MN = (known_NP**2).sum(1) - 2 * (outlines_MP @ known_NP.T)
        kind_M: NDArray[np.str_] = known_kind_N[distance_MN.argmin(1)]
        return kind_M

    accuracy = float((nearest_kinds(outlines_NP[test_N]) == kind_N[test_N]).mean())
    hits = int((nearest_kinds(np.stack([outline(picture) for picture in pictures])) == np.array(kinds)).sum())
    return ShapeAgreement(hits, len(kinds), hits / len(kinds), 1 / len(set(known_kind_N.tolist())), accuracy)


def outline(picture: Picture) -> NDArray[np.float32]:
    """The vivid pixels at a standard place and size: (_SIDE * _SIDE,) in [0, 1]; zeros if there are none."""
    mask = vivid(picture)
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return np.zeros(_SIDE * _SIDE, np.float32)
    y, x, reach = rows.mean() + 0.5, columns.mean() + 0.5, _REACH * max(rows.std(), columns.std(), 1.0)
    seen = Image.fromarray(mask.astype(np.uint8) * 255).transform(
        (_SIDE, _SIDE), Image.Transform.EXTENT, (x - reach, y - reach, x + reach, y + reach), Image.Resampling.BILINEAR
    )
    levels: NDArray[np.float32] = np.asarray(seen, np.float32).ravel() / np.float32(255)
    return levels
