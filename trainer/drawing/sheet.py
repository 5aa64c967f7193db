"""Contact sheets: labelled pictures in a grid or a table, as one PNG."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.drawing.picture_files import Pixels, picture_png
from trainer.drawing.settings import SamplingSettings

MOST_ON_A_SHEET = 400  # pictures
_MAX_PIXELS = 64_000_000
_GAP = 8  # pixels, around every tile
_FONT_SIZE, _LINE = 12, 16  # pixels
_CAPTION_LINES = 3  # at most
_ROW_LABEL = 120  # pixels: width of the labels of rows
# Small pictures are enlarged by a whole factor, so that a caption fits under them; large ones are reduced, so that a
# sheet stays small enough to be kept for every evaluation of a run.
_MIN_TILE, _MAX_TILE = 160, 512

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


Labelled = tuple[Pixels, str]  # a picture, and its label: at most 3 lines under it


def grid_png(
    prompts: Sequence[str], pictures: Sequence[Pixels], seeds: Sequence[int], settings: SamplingSettings
) -> bytes:
    """PNG of pictures of one size in reading order, with their prompts under them and the settings as metadata.

    Raises ValueError unless there is a picture and a seed for every prompt.
    """
    if not prompts or not len(prompts) == len(pictures) == len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(pictures)} pictures, {len(seeds)} seeds: give one of each")
    metadata = {"prompts": list(prompts), "seeds": list(seeds), **asdict(settings)}
    sheet = draw_sheet(in_rows(list(zip(pictures, prompts, strict=True))), caption_lines=_CAPTION_LINES)
    return picture_png(np.asarray(sheet), metadata)


def in_rows(pictures: Sequence[Labelled]) -> list[Sequence[Labelled]]:
    """The pictures in reading order, in about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    return [pictures[start : start + columns] for start in range(0, len(pictures), columns)]


def draw_sheet(
    rows: Sequence[Sequence[Labelled]],
    title: str = "",
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    caption_lines: int = 0,
) -> Image.Image:
    """Rows of pictures of any sizes, each row as high as it needs; its captions have at least `caption_lines` lines."""
    tiles = [[_tile(pixels) for pixels, _ in row] for row in rows]
    widest = max(tile.width for row in tiles for tile in row)
    captions = [[wrap_text(label, widest) for _, label in row] for row in rows]
    heights = [
        max(tile.height + max(len(lines), caption_lines) * _LINE for tile, lines in zip(*row, strict=True)) + _GAP
        for row in zip(tiles, captions, strict=True)
    ]
    left = _GAP + (_ROW_LABEL + _GAP if row_labels else 0)
    width = left + max(map(len, rows)) * (widest + _GAP)
    titles = wrap_text(title, width - 2 * _GAP)
    top = _GAP + (len(titles) + bool(column_labels)) * _LINE
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    _write(pen, (_GAP, _GAP), titles)
    for number, label in enumerate(column_labels):
        _write(pen, (left + number * (widest + _GAP), top - _LINE), wrap_text(label, widest)[:1])
    y = top
    for number, height in enumerate(heights):
        if row_labels:
            _write(pen, (_GAP, y), wrap_text(row_labels[number], _ROW_LABEL))
        for column, (tile, lines) in enumerate(zip(tiles[number], captions[number], strict=True)):
            x = left + column * (widest + _GAP)
            sheet.paste(tile, (x, y))
            _write(pen, (x, y + tile.height), lines)
        y += height
    return sheet


def limit_size(sheet: Image.Image) -> Image.Image:
    """The sheet, reduced to 64 million pixels if it is larger: Pillow and most viewers refuse much larger images."""
    factor = min(1.0, math.sqrt(_MAX_PIXELS / (sheet.width * sheet.height)))
    size = (int(sheet.width * factor), int(sheet.height * factor))
    return sheet.resize(size, Image.Resampling.LANCZOS) if factor < 1 else sheet


def _tile(pixels: Pixels) -> Image.Image:
    """The picture, enlarged or reduced to the size of a tile."""
    image = Image.fromarray(pixels)
    shorter, longer = sorted(image.size)
    if shorter < _MIN_TILE:
        factor = math.ceil(_MIN_TILE / shorter)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if longer > _MAX_TILE:
        width, height = (round(side * _MAX_TILE / longer) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str]) -> None:
    for number, line in enumerate(lines):
        pen.text((corner[0], corner[1] + number * _LINE), line, "black", _font())


def _font() -> _Font:
    return ImageFont.load_default(_FONT_SIZE)


def wrap_text(text: str, width: int) -> list[str]:
    """At most 3 lines of at most `width` pixels, broken between words; text that does not fit ends in "..."."""
    font = _font()
    if not isinstance(font, ImageFont.FreeTypeFont):  # a Pillow without FreeType has only a Latin font
        text = text.encode("latin-1", "replace").decode("latin-1")
    words = text.split()
    lines: list[str] = []
    while words and len(lines) < _CAPTION_LINES:
        count = max((n for n in range(1, len(words) + 1) if font.getlength(" ".join(words[:n])) <= width), default=1)
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += " ..."
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: _Font) -> str:
    """As much of the line as fits into `width` pixels."""
    if font.getlength(line) <= width:
        return line
    kept = line.removesuffix(" ...")
    while kept and font.getlength(kept + "...") > width:
        kept = kept[:-1]
    return kept + "..."
