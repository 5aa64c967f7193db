"""A labelled contact sheet of pictures of any sizes: a list of them, or the table of a sweep."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from trainer.drawing.grid import caption_lines, label_font, tile_of
from trainer.drawing.pictures import Pixels

# So that a sheet stays below the size at which Pillow, and most viewers, refuse to open it.
MOST_ON_A_SHEET = 400
_MOST_PIXELS = 64_000_000
_GAP = 8  # pixels, around every tile
_LINE = 16  # pixels from a line of text to the next
_SIDE_LABEL = 120  # pixels: width of the labels of rows


@dataclass(frozen=True)
class Labelled:
    pixels: Pixels
    label: str = ""  # under the picture, in three lines at most


def list_png(pictures: Sequence[Labelled], made_by: Mapping[str, Any]) -> bytes:
    """A PNG of all pictures in reading order, about as many rows as columns; made_by is in its text "hdm"."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return table_png(rows, made_by)


def table_png(
    rows: Sequence[Sequence[Labelled]],
    made_by: Mapping[str, Any],
    title: str = "",
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
) -> bytes:
    """A PNG of rows of pictures, each on the cell's upper left; ValueError where there are none, or too many."""
    count = sum(map(len, rows))
    if not 0 < count <= MOST_ON_A_SHEET:
        raise ValueError(f"{count} pictures on a sheet: from 1 to {MOST_ON_A_SHEET}")
    font = label_font()
    tiles = [[tile_of(picture.pixels) for picture in row] for row in rows]
    widest = max(tile.width for row in tiles for tile in row)
    captions = [[caption_lines(picture.label, widest, font) for picture in row] for row in rows]
    # As high as its own highest picture with its caption.
    heights = [
        max(tile.height + len(lines) * _LINE for tile, lines in zip(*row, strict=True)) + _GAP
        for row in zip(tiles, captions, strict=True)
    ]
    left = _GAP + (_SIDE_LABEL + _GAP if row_labels else 0)
    width = left + max(map(len, rows)) * (widest + _GAP)
    titles = caption_lines(title, width - 2 * _GAP, font)
    top = _GAP + (len(titles) + bool(column_labels)) * _LINE
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(titles):
        pen.text((_GAP, _GAP + number * _LINE), line, "black", font)
    for number, label in enumerate(column_labels):
        [line] = caption_lines(label, widest, font)[:1] or [""]
        pen.text((left + number * (widest + _GAP), top - _LINE), line, "black", font)
    y = top
    for number, height in enumerate(heights):
        if row_labels:
            _write(pen, (_GAP, y), caption_lines(row_labels[number], _SIDE_LABEL, font))
        for column, (tile, lines) in enumerate(zip(tiles[number], captions[number], strict=True)):
            x = left + column * (widest + _GAP)
            sheet.paste(tile, (x, y))
            _write(pen, (x, y + tile.height), lines)
        y += height
    return _png(sheet, made_by)


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str]) -> None:
    for number, line in enumerate(lines):
        pen.text((corner[0], corner[1] + number * _LINE), line, "black", label_font())


def _png(sheet: Image.Image, made_by: Mapping[str, Any]) -> bytes:
    if sheet.width * sheet.height > _MOST_PIXELS:
        factor = math.sqrt(_MOST_PIXELS / (sheet.width * sheet.height))
        sheet = sheet.resize((int(sheet.width * factor), int(sheet.height * factor)), Image.Resampling.LANCZOS)
    text = PngInfo()
    text.add_itxt("hdm", json.dumps(made_by))
    buffer = BytesIO()
    sheet.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()
