"""Raw rows of Danbooru and Pixiv -> `records.Post`. Field names and rules are those of the sites' APIs."""

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import pyarrow as pa

from pipeline.core.records import Post, Rejected
from pipeline.sources import danbooru, pixiv
from pipeline.sources.fields import IMAGE_COLUMNS, image_layout

_SITES: dict[str, ModuleType] = {"danbooru": danbooru, "pixiv": pixiv}
SOURCES = tuple(_SITES)
FIELDS: frozenset[str] = danbooru.FIELDS | pixiv.FIELDS | frozenset(IMAGE_COLUMNS)  # every field that is read
ADMISSIBLE = {name: site.ADMISSIBLE for name, site in _SITES.items()}  # reasons for rejection that --admit may lift


def recognise(columns: Collection[str], source: str = "auto", unread: Collection[str] = ()) -> str:
    """The source that has these columns. `unread` are other columns of the file, listed in the error.

    Raises ValueError, naming missing and found columns, if they match no source or not the one that was asked for.
    """
    found = set(columns)
    listed = sorted({*columns, *unread})
    matches = {name: len(found & site.TELLTALE_COLUMNS) for name, site in _SITES.items()}
    likeliest = max(matches, key=lambda name: matches[name])
    if source == "auto":
        source = likeliest
        if not matches[source]:
            raise ValueError(
                f"neither Danbooru's nor Pixiv's layout: found the columns {listed}, missing for danbooru "
                f"{danbooru.missing_columns(found)}, for pixiv {pixiv.missing_columns(found)}. "
                "Name them with --map column=field."
            )
    elif matches[likeliest] > matches[source]:
        raise ValueError(f"{likeliest}'s layout, not {source}'s: found {listed}. Leave --source out.")
    missing = _SITES[source].missing_columns(found)
    if missing:
        raise ValueError(
            f"not {source}'s layout: missing {missing}, found {listed}. Name them with --map column=field."
        )
    return source


def describe(schema: pa.Schema, source: str) -> str:
    """The variant of a source's layout, such as "danbooru, HF image struct, 5 tag categories, text ratings".

    Raises ValueError if no image column holds bytes.
    """
    return ", ".join([source, image_layout(schema), *_SITES[source].variant(schema)])


def id_columns(columns: Collection[str], source: str) -> list[str]:
    """The subset of `columns` that `row_id` reads."""
    return [name for name in _SITES[source].ID_COLUMNS if name.partition(".")[0] in columns]


def row_id(row: Mapping[str, Any], source: str) -> str:
    """Stable id of a raw row: "danbooru:ID" or "pixiv:ID_pPAGE". Raises ValueError if the row has no id."""
    found: str = _SITES[source].row_id(row)
    return found


def read_row(row: Mapping[str, Any], source: str, admit: Collection[str] = ()) -> Post | Rejected:
    """The row as a Post, or the reason why it has no usable image. `admit` lists reasons of ADMISSIBLE to ignore.

    Raises ValueError if the row has no id.
    """
    outcome: Post | Rejected = _SITES[source].read_row(row, admit)
    return outcome
