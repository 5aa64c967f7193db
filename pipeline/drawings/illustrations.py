"""Composition of the sample pictures: one main object in one of eight colours, determined by (seed, index).

`compose` decides everything about a picture; painting.py draws it. The main colour covers more of a picture than any
other saturated colour, because backgrounds are muted and other objects small. A rule that counts pixels can therefore
find it again in a drawn or a generated picture.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from pipeline.drawings.shapes import SHAPES, Rgb

T = TypeVar("T")

# Hue in degrees, saturation and value in 0..1. Neighbouring hues are at least 24 degrees apart and vary by at most 4.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0, 0.85, 0.90),
    "orange": (28, 0.90, 0.97),
    "yellow": (52, 0.85, 0.97),
    "green": (120, 0.70, 0.70),
    "aqua": (180, 0.75, 0.82),
    "blue": (220, 0.80, 0.90),
    "purple": (275, 0.68, 0.80),
    "pink": (325, 0.62, 0.97),
}
SIZES = {"small": (0.46, 0.54), "medium": (0.60, 0.70), "large": (0.76, 0.86)}  # object / short side
PLACES = ("centre", "on_the_left", "on_the_right", "at_the_top", "at_the_bottom")
# Tags of each background: Danbooru's names, except those that would put a second colour into the text.
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "white": ("white_background",),
    "grey": ("grey_background",),
    "beige": ("beige_background",),
    "gradient": ("gradient_background",),
    "striped": ("striped_background",),
    "polka_dot": ("polka_dot_background",),
    "checkered": ("checkered_background",),
    "night": ("night", "night_sky"),
    "outdoors": ("day", "outdoors"),
}
FLAWS = {"": "", "blurred": "blurry", "noisy": "film_grain", "artefacts": "jpeg_artifacts"}  # tag of each flaw
SHAPES_OF_EXTRAS = ("ball", "star", "heart", "flower", "cat")  # recognisable when small

# Weight of each aspect ratio (width, height), and the range of the short side in pixels.
_ASPECTS = {(1, 2): 6, (9, 16): 9, (2, 3): 16, (3, 4): 18, (1, 1): 18, (4, 3): 13, (3, 2): 9, (16, 9): 7, (2, 1): 4}
_SHORT_SIDE = (96, 224)
_FILE_TYPES = {"jpg": 66, "png": 18, "webp": 16}


@dataclass(frozen=True, kw_only=True)
class Taste:
    """Preferences of an artist. Over all artists, each colour is favoured three times."""

    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    stroke: str  # outline: dark | black | white | none


ARTISTS: dict[str, Taste] = {
    "button_fox": Taste(colours=("red", "orange"), backgrounds=("white", "gradient"), stroke="dark"),
    "ink_otter": Taste(colours=("blue", "purple"), backgrounds=("white", "grey"), stroke="black"),
    "lantern_moth": Taste(colours=("yellow", "purple"), backgrounds=("night",), stroke="none"),
    "moss_teapot": Taste(colours=("green", "aqua"), backgrounds=("outdoors", "beige"), stroke="dark"),
    "paper_tanuki": Taste(colours=("orange", "pink"), backgrounds=("beige", "striped"), stroke="white"),
    "plum_engine": Taste(colours=("purple", "red"), backgrounds=("checkered", "polka_dot"), stroke="black"),
    "quiet_radish": Taste(colours=("pink", "red"), backgrounds=("grey", "gradient"), stroke="none"),
    "rainy_marble": Taste(colours=("aqua", "blue"), backgrounds=("gradient", "striped"), stroke="dark"),
    "tin_sparrow": Taste(colours=("blue", "orange"), backgrounds=("outdoors", "grey"), stroke="dark"),
    "velvet_acorn": Taste(colours=("yellow", "green"), backgrounds=("outdoors", "checkered"), stroke="none"),
    "walnut_comet": Taste(colours=("aqua", "yellow"), backgrounds=("night", "striped"), stroke="white"),
    "woolly_kettle": Taste(colours=("pink", "green"), backgrounds=("polka_dot", "white"), stroke="dark"),
}
# Character and copyright of an object with this colour and kind.
CHARACTERS: dict[tuple[str, str], tuple[str, str]] = {
    ("red", "fish"): ("akari_(sample_tales)", "sample_tales"),
    ("yellow", "star"): ("hoshimaru_(sample_tales)", "sample_tales"),
    ("aqua", "cat"): ("minamo_(sample_tales)", "sample_tales"),
    ("purple", "moon"): ("yoiko_(paper_harbour)", "paper_harbour"),
    ("blue", "umbrella"): ("amane_(paper_harbour)", "paper_harbour"),
    ("pink", "butterfly"): ("chiyo_(paper_harbour)", "paper_harbour"),
    ("orange", "cat"): ("mikan_(tin_garden)", "tin_garden"),
    ("green", "tree"): ("old_moss_(tin_garden)", "tin_garden"),
}
COPYRIGHTS = ("original", "paper_harbour", "sample_tales", "tin_garden")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One drawn object."""

    kind: str
    colour: str
    hsv: tuple[float, float, float]  # the colour with its jitter: degrees, 0..1, 0..1
    pattern: str
    span: float  # pixels: longer side of the bounding box before tilting
    x: float  # pixels: centre
    y: float
    tilt: float  # degrees, clockwise


@dataclass(frozen=True, kw_only=True)
class Illustration:
    """Everything about a picture before it is drawn."""

    width: int  # pixels
    height: int
    main: Thing
    size: str
    place: str
    extras: tuple[Thing, ...]
    background: str
    tones: tuple[Rgb, Rgb]  # of the background
    artist: str
    copyright: str
    character: str  # "" for none
    quality: float  # 0..1, hidden: above 0.3 objects are shaded, below 0.06 there is a flaw
    flaw: str
    file_type: str  # jpg | png | webp
    grain: int  # seed of random details: stars, noise


def compose(seed: int, index: int) -> Illustration:
    """Picture number `index` of a dataset. Depends only on the two arguments."""
    rng = np.random.default_rng([seed, index])
    artist = _pick(rng, ARTISTS)
    taste = ARTISTS[artist]
    kind = _pick(rng, SHAPES)
    colour = _pick(rng, taste.colours if rng.random() < 0.35 else COLOURS)
    background = _pick(rng, taste.backgrounds if rng.random() < 0.5 else BACKGROUNDS)
    quality = float(rng.random())
    flaw = _pick(rng, [name for name in FLAWS if name]) if quality < 0.06 else ""
    across, down = _weighted(rng, _ASPECTS)
    unit = rng.integers(_SHORT_SIDE[0], _SHORT_SIDE[1] + 1) / min(across, down)
    width, height = int(across * unit), int(down * unit)
    size = _pick(rng, SIZES)
    # A large object leaves no room to be clearly off-centre.
    place = _pick(rng, PLACES[1:]) if size != "large" and rng.random() < 0.3 else PLACES[0]
    main = _place_main(rng, kind, colour, size, place, width, height)
    character, owner = CHARACTERS.get((colour, kind), ("", ""))
    return Illustration(
        width=width,
        height=height,
        main=main,
        size=size,
        place=place,
        extras=_place_extras(rng, main, width, height),
        background=background,
        tones=_tones(rng, background),
        artist=artist,
        copyright=owner or _pick(rng, COPYRIGHTS if rng.random() < 0.3 else COPYRIGHTS[:1]),
        character=character,
        quality=quality,
        flaw=flaw,
        file_type="jpg" if flaw == "artefacts" else _weighted(rng, _FILE_TYPES),
        grain=int(rng.integers(2**32)),
    )


def variant(of: Illustration, other: Illustration) -> Illustration:
    """`other` with the subject and artist of `of`, for another page of a work or a child post."""
    main = replace(other.main, kind=of.main.kind, colour=of.main.colour, hsv=of.main.hsv)
    extras = tuple(extra for extra in other.extras if extra.colour != main.colour)
    return replace(other, main=main, extras=extras, artist=of.artist, copyright=of.copyright, character=of.character)


def subject(thing: Thing) -> str:
    """The tag that names colour and kind, such as red_star."""
    return f"{thing.colour}_{thing.kind}"


def general_tags(scene: Illustration) -> list[str]:
    """Tags of everything visible, sorted as on Danbooru."""
    tags = {subject(scene.main), scene.size, *BACKGROUNDS[scene.background]}
    tags |= {f"small_{subject(extra)}" for extra in scene.extras}
    tags.add("multiple_objects" if scene.extras else "solo")
    if scene.main.pattern != "plain":
        tags.add(scene.main.pattern)
    if scene.place != "centre":
        tags.add(scene.place)
    if scene.flaw in ("blurred", "noisy"):
        tags.add(FLAWS[scene.flaw])
    return sorted(tags)


def _pick(rng: np.random.Generator, options: Iterable[T]) -> T:
    listed = list(options)
    return listed[int(rng.integers(len(listed)))]


def _weighted(rng: np.random.Generator, weights: dict[T, int]) -> T:
    ladder = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(ladder, rng.integers(ladder[-1]), side="right"))]


def _jittered(rng: np.random.Generator, colour: str) -> tuple[float, float, float]:
    hue, saturation, value = COLOURS[colour]
    jitter = rng.uniform(-1, 1, 3) * (4, 0.05, 0.04)
    return float(hue + jitter[0]) % 360, float(saturation + jitter[1]), float(min(1.0, value + jitter[2]))


def _place_main(
    rng: np.random.Generator, kind: str, colour: str, size: str, place: str, width: int, height: int
) -> Thing:
    """Near the centre (Gaussian, 8% of the side) or a quarter of a side towards `place`; always fully inside."""
    span = min(width, height) * rng.uniform(*SIZES[size])
    shift = {"on_the_left": (-1, 0), "on_the_right": (1, 0), "at_the_top": (0, -1), "at_the_bottom": (0, 1)}
    off = 0.25 * np.array(shift.get(place, (0, 0))) + rng.normal(0, 0.08 if place == "centre" else 0.03, 2)
    sides = np.array([width, height])
    x, y = np.clip(sides * (0.5 + off), 0.55 * span, sides - 0.55 * span)
    return Thing(
        kind=kind,
        colour=colour,
        hsv=_jittered(rng, colour),
        pattern=_weighted(rng, {"plain": 76, "striped": 8, "polka_dot": 8, "checkered": 8}),
        span=float(span),
        x=float(x),
        y=float(y),
        tilt=float(rng.normal(0, 7)),
    )


def _place_extras(rng: np.random.Generator, main: Thing, width: int, height: int) -> tuple[Thing, ...]:
    """One to three small objects in other colours, as far as they fit, in about a third of the pictures."""
    placed: list[Thing] = []
    wanted = int(rng.integers(1, 4)) if rng.random() < 0.35 else 0
    colours = [str(colour) for colour in rng.permutation(list(COLOURS)) if colour != main.colour]
    for colour in colours[:wanted]:
        kind = _pick(rng, [kind for kind in SHAPES_OF_EXTRAS if kind != main.kind])
        span = main.span * rng.uniform(0.24, 0.34)
        for _ in range(20):
            x, y = rng.uniform((span * 0.6, span * 0.6), (width - span * 0.6, height - span * 0.6))
            near = [np.hypot(x - t.x, y - t.y) < 0.54 * (span + t.span) for t in (main, *placed)]
            if not any(near):
                hsv, tilt = _jittered(rng, colour), rng.normal(0, 12)
                placed.append(
                    replace(main, kind=kind, colour=colour, hsv=hsv, pattern="plain", span=span, x=x, y=y, tilt=tilt)
                )
                break
    return tuple(placed)


def _tones(rng: np.random.Generator, background: str) -> tuple[Rgb, Rgb]:
    """Two muted background tones: saturation at most 0.24, or a value under 0.26."""
    hue = float(rng.uniform(0, 360))
    if background == "white":
        return (255, 255, 255), (255, 255, 255)
    if background == "grey":
        grey = float(rng.uniform(0.55, 0.8))
        return rgb(hue, 0.02, grey), rgb(hue, 0.02, grey)
    if background == "beige":
        beige = rgb(rng.uniform(34, 42), 0.16, rng.uniform(0.88, 0.95))
        return beige, beige
    if background == "night":
        return rgb(232, 0.45, rng.uniform(0.12, 0.16)), rgb(240, 0.40, rng.uniform(0.19, 0.25))
    if background == "outdoors":
        return rgb(205, rng.uniform(0.10, 0.20), 0.93), rgb(rng.uniform(70, 120), 0.22, rng.uniform(0.60, 0.75))
    second = float(rng.uniform(0.82, 0.88)) if background != "gradient" else float(rng.uniform(0.60, 0.80))
    return rgb(hue, 0.06, 0.97), rgb(hue, rng.uniform(0.12, 0.22), second)


def rgb(hue: float, saturation: float, value: float) -> Rgb:
    """8-bit RGB from hue (degrees), saturation and value (0..1)."""
    sextant = (np.array([5, 3, 1]) + hue / 60) % 6
    channels = value - value * saturation * np.clip(np.minimum(sextant, 4 - sextant), 0, 1)
    red, green, blue = (round(255 * float(channel)) for channel in channels)
    return red, green, blue
