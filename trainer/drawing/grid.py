"""Pictures with their prompts under them, on one sheet."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from trainer.drawing.pictures import Pixels, Settings

_GAP = 8  # pixels, around every tile
_LETTERS, _LINES = 12, 3  # of a caption: size in pixels, and how many lines at most
_LINE = _LETTERS + 4
# Small pictures are enlarged by a whole factor, so that a caption fits under them; large ones reduced, so that a sheet
# can be looked at, and kept for every evaluation of a run.
_SMALLEST, _LARGEST = 160, 512

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid_png(prompts: Sequence[str], pictures: Sequence[Pixels], seeds: Sequence[int], settings: Settings) -> bytes:
    """A PNG of all pictures, which have one size, in reading order; what they were made with is in its text "hdm".

    ValueError unless there is a picture and a seed for every prompt.
    """
    if not prompts or not len(prompts) == len(pictures) == len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(pictures)} pictures, {len(seeds)} seeds: give one of each")
    tiles = [tile_of(picture) for picture in pictures]
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    width, height = tiles[0].width + _GAP, tiles[0].height + _LINES * _LINE + _GAP
    sheet = Image.new("RGB", (_GAP + columns * width, _GAP + rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), label_font()
    for number, (tile, prompt) in enumerate(zip(tiles, prompts, strict=True)):
        row, column = divmod(number, columns)
        x, y = _GAP + column * width, _GAP + row * height
        sheet.paste(tile, (x, y))
        for line, words in enumerate(caption_lines(prompt, tile.width, font)):
            pen.text((x, y + tile.height + line * _LINE), words, "black", font)
    made_by = PngInfo()
    made_by.add_itxt("hdm", json.dumps({"prompts": list(prompts), "seeds": list(seeds), **asdict(settings)}))
    buffer = BytesIO()
    sheet.save(buffer, "PNG", pnginfo=made_by)
    return buffer.getvalue()


def tile_of(pixels: Pixels) -> Image.Image:
    """The picture as a sheet shows it: see _SMALLEST and _LARGEST."""
    image = Image.fromarray(pixels)
    shorter, longer = sorted(image.size)
    if shorter < _SMALLEST:
        factor = math.ceil(_SMALLEST / shorter)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if longer > _LARGEST:
        width, height = (round(side * _LARGEST / longer) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def caption_lines(text: str, width: int, font: _Font | None = None) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words; what is too much ends in "..."."""
    font = font or label_font()
    words = _drawable(text, font).split()
    lines: list[str] = []
    while words and len(lines) < _LINES:
        count = max((n for n in range(1, len(words) + 1) if font.getlength(" ".join(words[:n])) <= width), default=1)
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += " ..."
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: _Font) -> str:
    """As much of it as fits."""
    if font.getlength(line) <= width:
        return line
    kept = line.removesuffix(" ...")
    while kept and font.getlength(kept + "...") > width:
        kept = kept[:-1]
    return kept + "..."


def label_font() -> _Font:
    return ImageFont.load_default(_LETTERS)


def _drawable(text: str, font: _Font) -> str:
    """A Pillow without FreeType has a font of Latin letters only, and raises for others."""
    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")
