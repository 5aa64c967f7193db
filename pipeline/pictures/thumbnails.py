"""Thumbnails small enough to embed hundreds of them in a page."""

import base64
import io

from pipeline.pictures.decoder import DecodeLimits, Refused, decode

_SIDE = 176  # pixels of the longer side: shown at about half of it, for dense screens
_QUALITY = 60


def data_uri(picture: bytes) -> str | None:
    """The picture as a small WebP in a data URI, None if it cannot be decoded."""
    # Ingest has checked these pictures against limits of its own; these only bound the memory of this process.
    decoded = decode(picture, DecodeLimits(max_aspect=1000.0, min_side=1))
    if isinstance(decoded, Refused):
        return None
    decoded.image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    decoded.image.save(buffer, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
