"""The embedded sample pictures: one main object in one of eight colours, drawn from (seed, index) alone.

`compose` decides everything about a picture, `draw` paints it, `encode` makes the file. The main colour covers more of
a picture than any other saturated colour does - backgrounds stay muted, other objects small - so a rule that only
counts pixels can find it again in a real or a generated picture.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pipeline.drawings.shapes import FIXED_TONES, PATTERNS, SHAPES, Points, Rgb, turn

T = TypeVar("T")

# Hue in degrees, saturation and value in 0..1. Neighbouring hues are at least 24 degrees apart and jitter by at most 4.
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
SIZES = {"small": (0.46, 0.54), "medium": (0.60, 0.70), "large": (0.76, 0.86)}  # longer side of the object / short side
PLACES = ("centre", "on_the_left", "on_the_right", "at_the_top", "at_the_bottom")
# Background -> its tags. Danbooru's own names, without those that would put a second colour into the text.
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
FLAWS = {"": "", "blurred": "blurry", "noisy": "film_grain", "artefacts": "jpeg_artifacts"}  # flaw -> its tag
SHAPES_OF_EXTRAS = ("ball", "star", "heart", "flower", "cat")  # still readable when small

# Width / height and how often. The short side is drawn between these pixels.
_ASPECTS = {(1, 2): 6, (9, 16): 9, (2, 3): 16, (3, 4): 18, (1, 1): 18, (4, 3): 13, (3, 2): 9, (16, 9): 7, (2, 1): 4}
_SHORT_SIDE = (96, 224)
_FILE_TYPES = {"jpg": 66, "png": 18, "webp": 16}
_OVERSAMPLING = 2  # drawn at this many times the size, then averaged: smooth edges


@dataclass(frozen=True, kw_only=True)
class Taste:
    """What an artist likes; all artists together favour each colour three times."""

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
# (colour, kind) -> (character, copyright): always drawn as this character.
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
    span: float  # pixels: longer side of the upright object's box
    x: float  # pixels: centre
    y: float
    tilt: float  # degrees, clockwise


@dataclass(frozen=True, kw_only=True)
class Illustration:
    """All that is known about a picture before it is drawn."""

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
    quality: float  # 0..1, hidden: more shading above, a flaw at the very bottom
    flaw: str
    file_type: str  # jpg | png | webp
    grain: int  # seed of whatever is sprinkled: stars, noise


# --- Composing --------------------------------------------------------------------------------------------------------


def compose(seed: int, index: int) -> Illustration:
    """Picture number `index` of a dataset; the same for the same two numbers, whatever else is drawn."""
    rng = np.random.default_rng([seed, index])
    artist = _pick(rng, ARTISTS)
    taste = ARTISTS[artist]
    kind = _pick(rng, SHAPES)
    colour = _pick(rng, taste.colours if rng.random() < 0.35 else COLOURS)
    background = _pick(rng, taste.backgrounds if rng.random() < 0.5 else BACKGROUNDS)
    quality = float(rng.random())
    flaw = _pick(rng, [name for name in FLAWS if name]) if quality < 0.06 else ""
    width, height = _frame(rng)
    size = _pick(rng, SIZES)
    # A large object has no room to be clearly off the centre.
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
    """`other`, with the subject and the artist of `of`: another page of a work, or a child post."""
    main = replace(other.main, kind=of.main.kind, colour=of.main.colour, hsv=of.main.hsv)
    extras = tuple(extra for extra in other.extras if extra.colour != main.colour)
    return replace(other, main=main, extras=extras, artist=of.artist, copyright=of.copyright, character=of.character)


def _pick(rng: np.random.Generator, options: Iterable[T]) -> T:
    listed = list(options)
    return listed[int(rng.integers(len(listed)))]


def _weighted(rng: np.random.Generator, weights: dict[T, int]) -> T:
    ladder = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(ladder, rng.integers(ladder[-1]), side="right"))]


def _frame(rng: np.random.Generator) -> tuple[int, int]:
    across, down = _weighted(rng, _ASPECTS)
    unit = rng.integers(_SHORT_SIDE[0], _SHORT_SIDE[1] + 1) / min(across, down)
    return int(across * unit), int(down * unit)


def _jittered(rng: np.random.Generator, colour: str) -> tuple[float, float, float]:
    hue, saturation, value = COLOURS[colour]
    jitter = rng.uniform(-1, 1, 3) * (4, 0.05, 0.04)
    return float(hue + jitter[0]) % 360, float(saturation + jitter[1]), float(min(1.0, value + jitter[2]))


def _place_main(
    rng: np.random.Generator, kind: str, colour: str, size: str, place: str, width: int, height: int
) -> Thing:
    """Near the centre (Gaussian, 8% of the side), or a quarter of a side off it towards `place`; always inside."""
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
    """In about a third of the pictures one to three small objects in other colours, where there is room for them."""
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
                hsv = _jittered(rng, colour)
                placed.append(
                    Thing(
                        kind=kind, colour=colour, hsv=hsv, pattern="plain", span=span, x=x, y=y, tilt=rng.normal(0, 12)
                    )
                )
                break
    return tuple(placed)


def _tones(rng: np.random.Generator, background: str) -> tuple[Rgb, Rgb]:
    """Two muted tones: saturation at most 0.24, or a value under 0.26."""
    hue = float(rng.uniform(0, 360))
    if background == "white":
        return (255, 255, 255), (255, 255, 255)
    if background == "grey":
        grey = float(rng.uniform(0.55, 0.8))
        return _rgb(hue, 0.02, grey), _rgb(hue, 0.02, grey)
    if background == "beige":
        beige = _rgb(rng.uniform(34, 42), 0.16, rng.uniform(0.88, 0.95))
        return beige, beige
    if background == "night":
        return _rgb(232, 0.45, rng.uniform(0.12, 0.16)), _rgb(240, 0.40, rng.uniform(0.19, 0.25))
    if background == "outdoors":
        return _rgb(205, rng.uniform(0.10, 0.20), 0.93), _rgb(rng.uniform(70, 120), 0.22, rng.uniform(0.60, 0.75))
    second = float(rng.uniform(0.82, 0.88)) if background != "gradient" else float(rng.uniform(0.60, 0.80))
    return _rgb(hue, 0.06, 0.97), _rgb(hue, rng.uniform(0.12, 0.22), second)


# --- Drawing ----------------------------------------------------------------------------------------------------------


def draw(scene: Illustration) -> Image.Image:
    """The picture: RGB, (width, height) pixels."""
    canvas = Image.new("RGB", (scene.width * _OVERSAMPLING, scene.height * _OVERSAMPLING), scene.tones[0])
    rng = np.random.default_rng(scene.grain)
    _draw_background(canvas, scene, rng)
    stroke = ARTISTS[scene.artist].stroke
    for thing in (*scene.extras, scene.main):
        _draw_thing(canvas, thing, stroke, shaded=scene.quality > 0.3)
    picture = canvas.reduce(_OVERSAMPLING)
    if scene.flaw == "blurred":
        return picture.filter(ImageFilter.GaussianBlur(min(picture.size) / 64))
    if scene.flaw == "noisy":
        pixels = np.asarray(picture, dtype=np.float32) + rng.normal(0, 16, (*picture.size[::-1], 1))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return picture


def encode(picture: Image.Image, scene: Illustration) -> bytes:
    """The file's bytes, in the scene's file type; the same for the same build of Pillow and its codecs."""
    file = io.BytesIO()
    if scene.file_type == "png":
        picture.save(file, "PNG", compress_level=4)
    elif scene.file_type == "webp":
        picture.save(file, "WEBP", quality=90, method=2)
    else:
        picture.save(file, "JPEG", quality=14 if scene.flaw == "artefacts" else 92)
    return file.getvalue()


def _rgb(hue: float, saturation: float, value: float) -> Rgb:
    """HSV (degrees, 0..1, 0..1) to 8-bit RGB."""
    sextant = (np.array([5, 3, 1]) + hue / 60) % 6
    channels = value - value * saturation * np.clip(np.minimum(sextant, 4 - sextant), 0, 1)
    red, green, blue = (round(255 * float(channel)) for channel in channels)
    return red, green, blue


def _draw_background(canvas: Image.Image, scene: Illustration, rng: np.random.Generator) -> None:
    width, height = canvas.size
    step = min(width, height) / 7
    pen = ImageDraw.Draw(canvas)
    second = scene.tones[1]
    if scene.background in ("gradient", "night"):
        mix = np.linspace(0, 1, height)[:, None, None]
        column = (1 - mix) * np.array(scene.tones[0]) + mix * np.array(second)
        canvas.paste(Image.fromarray(column.round().astype(np.uint8)).resize(canvas.size, Image.Resampling.NEAREST))
    if scene.background == "night":
        for x, y, radius in rng.uniform((0, 0, 0.8), (width, height, 2.6), (int(width * height / 4500), 3)):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(236, 236, 226))
    elif scene.background == "outdoors":
        horizon = height * float(rng.uniform(0.62, 0.74))
        for x, y in rng.uniform((0, 0.05 * height), (width, 0.4 * height), (2, 2)):
            for dx, radius in ((-0.6, 0.35), (0.0, 0.5), (0.6, 0.35)):
                cx, r = x + dx * step, radius * step
                pen.ellipse((cx - r, y - r, cx + r, y + r * 0.8), fill=(250, 251, 252))
        hill = width * float(rng.uniform(0.2, 0.8))
        pen.rectangle((0, horizon, width, height), fill=second)
        pen.ellipse((hill - width * 0.5, horizon - step * 0.8, hill + width * 0.5, horizon + step * 1.6), fill=second)
    elif scene.background == "striped":
        for x in np.arange(-height, width, 2 * step).tolist():
            pen.polygon([(x, height), (x + height, 0), (x + height + step, 0), (x + step, height)], fill=second)
    elif scene.background in ("polka_dot", "checkered"):
        for row in range(int(height / step) + 1):
            for column_index in range(row % 2, int(width / step) + 1, 2):
                x, y = column_index * step, row * step
                if scene.background == "checkered":
                    pen.rectangle((x, y, x + step, y + step), fill=second)
                else:
                    pen.ellipse((x + 0.2 * step, y + 0.2 * step, x + 0.8 * step, y + 0.8 * step), fill=second)


def _draw_thing(canvas: Image.Image, thing: Thing, stroke: str, shaded: bool) -> None:
    """Paint one object inside its own box of the canvas: shadow, outline, patterned and shaded body, details."""
    half = thing.span / 2 * _OVERSAMPLING
    reach = int(1.35 * half) + 4  # a tilted box's corner and the outline
    left, top = round(thing.x * _OVERSAMPLING) - reach, round(thing.y * _OVERSAMPLING) - reach
    box = canvas.crop((left, top, left + 2 * reach, top + 2 * reach))
    turned = turn(thing.tilt) * half

    def place(points: Points) -> list[tuple[float, float]]:
        return [(x, y) for x, y in (points @ turned + reach).tolist()]

    shape = SHAPES[thing.kind]
    body = [place(points) for points in shape.body]
    tones = FIXED_TONES | _body_tones(thing)
    mask = Image.new("L", box.size)
    mask_pen = ImageDraw.Draw(mask)
    for polygon in body:
        mask_pen.polygon(polygon, fill=255)
    offset = max(2, round(0.07 * half))
    if shaded:
        box.paste((0, 0, 0), (offset, offset), mask.point(_LIGHTEST))
    pen = ImageDraw.Draw(box)
    if stroke != "none":
        line, width = tones[stroke], max(3, round(0.11 * half))
        for points in shape.outlined:
            polygon = place(points)
            pen.line([*polygon, polygon[0]], fill=line, width=width)
        # Rounds the sharp turns only: drawing each joint round took a third of all the time.
        for x, y in place(shape.corners):
            pen.circle((x, y), width / 2, fill=line)
    for tone, points in shape.behind:
        pen.polygon(place(points), fill=tones[tone])

    fill = Image.new("RGB", box.size, tones["body"])
    fill_pen = ImageDraw.Draw(fill)
    for points in PATTERNS[thing.pattern]:
        fill_pen.polygon(place(points), fill=tones["pattern"])
    if shaded:
        shade = mask.copy()
        shade.paste(0, (-2 * offset, -2 * offset), mask)
        fill.paste(tones["dark"], mask=shade.point(_HALF))
    box.paste(fill, mask=mask)
    for tone, points in shape.front:
        pen.polygon(place(points), fill=tones[tone])
    canvas.paste(box, (left, top))


def _body_tones(thing: Thing) -> dict[str, Rgb]:
    hue, saturation, value = thing.hsv
    # Yellow that is as dark as the others' shade looks olive.
    shade = 0.80 if thing.colour == "yellow" else 0.66
    light, dark = _rgb(hue, saturation * 0.35, 1.0), _rgb(hue, saturation, value * shade)
    # On a light colour a lighter pattern would not show.
    pattern = dark if thing.colour in ("yellow", "aqua") else light
    return {"body": _rgb(*thing.hsv), "light": light, "dark": dark, "pattern": pattern}


_LIGHTEST = [level // 8 for level in range(256)]  # mask -> one eighth of it: a faint shadow
_HALF = [level // 2 for level in range(256)]


# --- Tags -------------------------------------------------------------------------------------------------------------


def subject(thing: Thing) -> str:
    """The one tag that names colour and kind, e.g. red_star."""
    return f"{thing.colour}_{thing.kind}"


def general_tags(scene: Illustration) -> list[str]:
    """What is to be seen, sorted as on Danbooru."""
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
