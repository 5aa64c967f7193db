"""Raw rows of each site -> `records.Post`, nothing else. Field names and rules are those of the sites' own APIs."""

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import pyarrow as pa

from pipeline.core.records import Post, Rejected
from pipeline.sources import danbooru, pixiv
from pipeline.sources.fields import IMAGE_COLUMNS, image_layout

_SITES: dict[str, ModuleType] = {"danbooru": danbooru, "pixiv": pixiv}
SOURCES = tuple(_SITES)
FIELDS: frozenset[str] = danbooru.FIELDS | pixiv.FIELDS | frozenset(IMAGE_COLUMNS)  # all that any reader looks at
ADMISSIBLE = {name: site.ADMISSIBLE for name, site in _SITES.items()}  # refusals that a user may lift


def recognise(columns: Collection[str], source: str = "auto", unread: Collection[str] = ()) -> str:
    """The source whose layout these columns have; `unread` are a file's other columns.

    Raises ValueError, naming the columns that are missing and those that were found, where they are no such layout.
    """
    found = set(columns)
    listed = sorted({*columns, *unread})
    telling = {name: len(found & site.TELLTALE_COLUMNS) for name, site in _SITES.items()}
    likeliest = max(telling, key=lambda name: telling[name])
    if source == "auto":
        source = likeliest
        if not telling[source]:
            raise ValueError(
                f"neither Danbooru's nor Pixiv's layout: found the columns {listed}, missing for danbooru "
                f"{danbooru.missing_columns(found)}, for pixiv {pixiv.missing_columns(found)}; "
                "name them with --map column=field"
            )
    elif telling[likeliest] > telling[source]:
        raise ValueError(f"{likeliest}'s layout, not {source}'s: found {listed}; leave --source out")
    missing = _SITES[source].missing_columns(found)
    if missing:
        raise ValueError(f"not {source}'s layout: missing {missing}, found {listed}; name them with --map column=field")
    return source


def describe(schema: pa.Schema, source: str) -> str:
    """The variant of the source's layout in words, as in "danbooru, HF image struct, 5 tag categories, text ratings".

    ValueError where a column that must hold pictures holds something else.
    """
    return ", ".join([source, image_layout(schema), *_SITES[source].variant(schema)])


def id_columns(columns: Collection[str], source: str) -> list[str]:
    """Those of the columns that `row_id` needs."""
    return [name for name in _SITES[source].ID_COLUMNS if name.partition(".")[0] in columns]


def row_id(row: Mapping[str, Any], source: str) -> str:
    """The stable id of a raw row. ValueError where it has none."""
    found: str = _SITES[source].row_id(row)
    return found


def read_row(row: Mapping[str, Any], source: str, admit: Collection[str] = ()) -> Post | Rejected:
    """The row as a Post, or why it has no usable picture; ValueError where the row has no id. `admit` are reasons of
    ADMISSIBLE that refuse nothing."""
    outcome: Post | Rejected = _SITES[source].read_row(row, admit)
    return outcome
