"""Draws composed pictures and encodes them as image files."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pipeline.drawings.illustrations import ARTISTS, Illustration, Thing, rgb
from pipeline.drawings.shapes import FIXED_TONES, PATTERNS, SHAPES, Points, Rgb, rotation

_OVERSAMPLING = 2  # drawn at this multiple of the size, then averaged, for smooth edges
# Lookup tables that scale a mask: a faint shadow, a half-transparent shade.
_LIGHTEST = [level // 8 for level in range(256)]
_HALF = [level // 2 for level in range(256)]


def draw(scene: Illustration) -> Image.Image:
    """RGB picture of scene.width x scene.height pixels."""
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
    """Image file in the scene's file type. Bytes are reproducible with the same build of Pillow and its codecs."""
    file = io.BytesIO()
    if scene.file_type == "png":
        picture.save(file, "PNG", compress_level=4)
    elif scene.file_type == "webp":
        picture.save(file, "WEBP", quality=90, method=2)
    else:
        picture.save(file, "JPEG", quality=14 if scene.flaw == "artefacts" else 92)
    return file.getvalue()


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
    """Draw one object with shadow, outline, patterned and shaded body, and details."""
    half = thing.span / 2 * _OVERSAMPLING
    reach = int(1.35 * half) + 4  # room for the tilted corners and the outline
    left, top = round(thing.x * _OVERSAMPLING) - reach, round(thing.y * _OVERSAMPLING) - reach
    box = canvas.crop((left, top, left + 2 * reach, top + 2 * reach))
    turned = rotation(thing.tilt) * half

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
        # Only sharp corners are rounded: rounding every joint took a third of the drawing time.
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
    # A darker yellow looks olive.
    shade = 0.80 if thing.colour == "yellow" else 0.66
    light, dark = rgb(hue, saturation * 0.35, 1.0), rgb(hue, saturation, value * shade)
    # A lighter pattern is invisible on light colours.
    pattern = dark if thing.colour in ("yellow", "aqua") else light
    return {"body": rgb(*thing.hsv), "light": light, "dark": dark, "pattern": pattern}
