"""PNG files that record how their picture was made, under the text key "hdm" and in a JSON file beside them."""

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.storage.shards import Store
from trainer.drawing.settings import PictureRequest
from trainer.encoders.pretrained import first_line

Pixels = NDArray[np.uint8]  # (H, W, 3)

_KEY = "hdm"
# Pillow raises these for damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def picture_png(pixels: Pixels, metadata: Mapping[str, Any]) -> bytes:
    """Encodes a PNG with the metadata as JSON under the text key "hdm". `read_metadata` is the inverse."""
    text = PngInfo()
    text.add_itxt(_KEY, json.dumps(metadata))
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of a picture written by `save_picture`. Raises ValueError for any other or a damaged file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            metadata = json.loads(image.info.get(_KEY, "null"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except _DAMAGED as error:
        raise ValueError(
            f"{path} is not a PNG or is damaged ({first_line(error)}). Give a picture written by trainer/sample.py."
        ) from error
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{path} does not say how it was made. Give a PNG of trainer/sample.py that no other program has rewritten."
        )
    if "prompt" not in metadata:
        raise ValueError(f"{path} is a sheet of many pictures. Give a single picture of trainer/sample.py.")
    return metadata


def save_picture(
    out: Path,
    pixels: Pixels,
    request: PictureRequest,
    made_with: Mapping[str, Any],
    batch: Mapping[str, Any] | None = None,
) -> Path:
    """Writes OUT/<picture_name>.png, then a JSON file of the same name with the same metadata. Returns the PNG's path.

    made_with: `PictureModel.made_with`. batch: prompts and seeds of the pictures drawn in the same batch and the place
    of this one among them, because only a batch of the same size rounds the same way.
    """
    name = picture_name(request, made_with)
    metadata = _metadata(request, made_with) | ({"company": dict(batch)} if batch else {})
    store = Store(str(out))
    store.write(f"{name}.png", picture_png(pixels, metadata))
    store.write(f"{name}.json", json.dumps(metadata, indent=1, ensure_ascii=False).encode())
    return out / f"{name}.png"


def picture_name(request: PictureRequest, made_with: Mapping[str, Any]) -> str:
    """<seed>-<prompt>-<hash>. The hash covers everything that decides the picture, so that only the same command
    overwrites it."""
    digest = hashlib.sha256(json.dumps(_metadata(request, made_with)).encode()).hexdigest()
    return f"{request.seed:06d}-{slug(request.prompt)}-{digest[:6]}"


def _metadata(request: PictureRequest, made_with: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": request.prompt, "seed": request.seed, **asdict(request.settings), **made_with}


def slug(prompt: str) -> str:
    """The prompt in lower-case letters, digits and dashes, for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "unconditional"
