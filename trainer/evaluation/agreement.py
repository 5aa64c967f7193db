"""Does a picture have the main colour that its prompt asked for? A rule on pixels that shares nothing with the model
or with the code that draws the sample dataset, so that neither can flatter the other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Hue circle in degrees: where people place these words, not evenly spaced.
COLOUR_HUES = {
    "red": 0,
    "orange": 28,
    "yellow": 52,
    "green": 120,
    "aqua": 180,
    "blue": 220,
    "purple": 275,
    "pink": 325,
}

# Pastel grounds, greys, outlines and shadows have no say.
MIN_SATURATION = 0.45
MIN_VALUE = 0.35
MIN_VOTING_SHARE = 0.005  # of the pixels: fewer are speckle or the seam of an outline

_COLOUR_WORD = re.compile(rf"\b({'|'.join(COLOUR_HUES)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Agreement:
    """How many pictures have the colour that was asked for, beside what a blind guess of one colour would reach."""

    hits: int
    total: int
    share: float
    chance: float


def main_colour(pixels_HWC: NDArray[np.uint8]) -> str | None:
    """The colour word that most saturated, bright pixels are nearest to in hue; None where too few of them are."""
    hue = _hue_saturation_value(pixels_HWC.reshape(-1, 3))[0]
    voters = hue[vivid(pixels_HWC).reshape(-1)]
    if len(voters) < MIN_VOTING_SHARE * len(hue):
        return None
    centres = np.array(list(COLOUR_HUES.values()))
    distance = np.abs((voters[:, None] - centres + 180) % 360 - 180)
    votes = np.bincount(distance.argmin(axis=1), minlength=len(centres))
    return list(COLOUR_HUES)[int(votes.argmax())]


def vivid(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(H, W): the saturated, bright pixels, which are those of the objects."""
    _, saturation, value = _hue_saturation_value(pixels_HWC.reshape(-1, 3))
    has_a_say: NDArray[np.bool_] = (saturation > MIN_SATURATION) & (value > MIN_VALUE)
    return has_a_say.reshape(pixels_HWC.shape[:2])


def prompted_colour(prompt: str) -> str | None:
    """The first colour word of the prompt; None where it has none."""
    found = _COLOUR_WORD.search(prompt)
    return found.group().lower() if found else None


def colour_agreement(prompts: Sequence[str], pictures: Sequence[NDArray[np.uint8]]) -> Agreement:
    """Counts the pictures (H, W, 3 uint8) whose main colour is the one that their prompt asked for."""
    if not prompts or len(prompts) != len(pictures):
        raise ValueError(f"{len(prompts)} prompts and {len(pictures)} pictures: give one prompt a picture, at least 1")
    asked = [prompted_colour(prompt) for prompt in prompts]
    if None in asked:
        raise ValueError(
            f"the prompt {prompts[asked.index(None)]!r} names no colour that can be judged: "
            f"use one of {', '.join(COLOUR_HUES)}"
        )
    hits = sum(main_colour(picture) == colour for picture, colour in zip(pictures, asked, strict=True))
    return Agreement(hits, len(prompts), hits / len(prompts), 1 / len(COLOUR_HUES))


def _hue_saturation_value(rgb_N3: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Hue in degrees [0, 360), saturation and value in [0, 1], of each pixel: the hexagonal HSV of Smith 1978."""
    r, g, b = (rgb_N3.astype(np.float32) / 255).T
    value = np.maximum(np.maximum(r, g), b)
    chroma = value - np.minimum(np.minimum(r, g), b)
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.select(
        [value == r, value == g],
        [((g - b) / safe) % 6, (b - r) / safe + 2],
        (r - g) / safe + 4,
    )
    return hue * 60 % 360, chroma / np.where(value > 0, value, 1), value
