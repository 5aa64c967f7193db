"""Does a picture show the kind of object that its prompt asked for? For pictures of one vivid object on a muted ground,
such as the embedded sample's: judged by the nearest outline among pictures whose kind is known.

Nothing is learned but the outlines themselves, and how often the judge is right on pictures of which it was not told
is part of its verdict.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.evaluation.agreement import COLOUR_HUES, vivid

Picture = NDArray[np.uint8]  # (H, W, 3)

_SIDE = 16  # pixels of an outline
_REACH = 2.5  # half the side of what an outline shows, in standard deviations of the object's pixels
_TESTED = 5  # one known picture in so many tests the judge
_COLOURED = re.compile(rf"({'|'.join(COLOUR_HUES)}) (\w+)", re.IGNORECASE)


@dataclass(frozen=True)
class ShapeAgreement:
    hits: int
    total: int
    share: float
    chance: float  # of a blind guess of one kind
    judge: float  # share of pictures of known kind, kept from the judge, that it names rightly


def coloured_object(tags: Sequence[str]) -> tuple[str, str] | None:
    """The colour and the kind, where exactly one tag is of a colour and one more word ("red star")."""
    found = [match for tag in tags if (match := _COLOURED.fullmatch(tag))]
    return (found[0][1].lower(), found[0][2].lower()) if len(found) == 1 else None


@dataclass(frozen=True, eq=False)
class Judge:
    outlines_NP: NDArray[np.float32]
    kinds: tuple[str, ...]  # of each outline
    right: float  # share of the tested pictures

    @classmethod
    def of(cls, pictures: Sequence[Picture], kinds: Sequence[str]) -> "Judge":
        """ValueError for pictures of one kind alone, or too few of them."""
        if len(set(kinds)) < 2 or len(pictures) < 2 * _TESTED:
            raise ValueError(
                f"{len(pictures)} pictures of {len(set(kinds))} kinds: a judge of outlines needs {2 * _TESTED} of 2"
            )
        outlines_NP = np.stack([outline(picture) for picture in pictures])
        tested_N = np.arange(len(pictures)) % _TESTED == 0
        judge = cls(outlines_NP[~tested_N], tuple(np.array(kinds)[~tested_N].tolist()), 0.0)
        named = judge._nearest(outlines_NP[tested_N])
        right = [name == kind for name, kind in zip(named, np.array(kinds)[tested_N].tolist(), strict=True)]
        return cls(judge.outlines_NP, judge.kinds, sum(right) / len(right))

    def named(self, pictures: Sequence[Picture]) -> list[str]:
        return self._nearest(np.stack([outline(picture) for picture in pictures]))

    def agreement(self, kinds: Sequence[str], pictures: Sequence[Picture]) -> ShapeAgreement:
        """Counts the pictures that show the kind asked for. ValueError unless there is one kind a picture."""
        if not kinds or len(kinds) != len(pictures):
            raise ValueError(f"{len(kinds)} kinds and {len(pictures)} pictures: give one kind a picture, at least 1")
        hits = sum(name == kind for name, kind in zip(self.named(pictures), kinds, strict=True))
        return ShapeAgreement(hits, len(kinds), hits / len(kinds), 1 / len(set(self.kinds)), self.right)

    def _nearest(self, outlines_MP: NDArray[np.float32]) -> list[str]:
        products_MN = outlines_MP @ self.outlines_NP.T
        distance_MN = (self.outlines_NP**2).sum(1) - 2 * products_MN  # and what is the same for all outlines
        return [self.kinds[number] for number in distance_MN.argmin(1).tolist()]


def outline(picture: Picture) -> NDArray[np.float32]:
    """(_SIDE * _SIDE,) in [0, 1]: the vivid pixels, brought to one place and size; zeros where there are none."""
    vivid_HW = vivid(picture)
    rows, columns = np.nonzero(vivid_HW)
    if not len(rows):
        return np.zeros(_SIDE * _SIDE, np.float32)
    y, x, reach = rows.mean() + 0.5, columns.mean() + 0.5, _REACH * max(rows.std(), columns.std(), 1.0)
    seen = Image.fromarray(vivid_HW.astype(np.uint8) * 255).transform(
        (_SIDE, _SIDE), Image.Transform.EXTENT, (x - reach, y - reach, x + reach, y + reach), Image.Resampling.BILINEAR
    )
    levels: NDArray[np.float32] = np.asarray(seen, np.float32).ravel() / np.float32(255)
    return levels
