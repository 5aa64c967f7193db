"""Raw rows of Danbooru and Pixiv -> `records.Post`. Field names and rules are those of the sites' APIs.

SITES has one module per site, with the same functions: row_id, named_page, read_row, removal, refreshes and variant.
"""

from collections.abc import Collection
from types import ModuleType

import pyarrow as pa

from pipeline.sources import danbooru, pixiv
from pipeline.sources.pictures import IMAGE_COLUMNS, image_layout

SITES: dict[str, ModuleType] = {"danbooru": danbooru, "pixiv": pixiv}
SOURCES = tuple(SITES)
FIELDS: frozenset[str] = danbooru.FIELDS | pixiv.FIELDS | frozenset(IMAGE_COLUMNS)  # every field that is read
ADMISSIBLE = {name: site.ADMISSIBLE for name, site in SITES.items()}


def recognise(columns: Collection[str], source: str = "auto", unread: Collection[str] = ()) -> str:
    """The source that has these columns. `unread` are other columns of the file, listed in the error.

    Raises ValueError, naming missing and found columns, if they match no source or not the one that was asked for.
    """
    found = set(columns)
    listed = sorted({*columns, *unread})
    matches = {name: len(found & site.TELLTALE_COLUMNS) for name, site in SITES.items()}
    missing = {
        name: [" or ".join(names) for names in site.REQUIRED if not found & set(names)] for name, site in SITES.items()
    }
    likeliest = max(matches, key=lambda name: matches[name])
    if source == "auto":
        source = likeliest
        if not matches[source] and (complete := [name for name, fields in missing.items() if not fields]):
            raise ValueError(
                f"of an unclear layout: its columns {listed} fit {' and '.join(complete)}. Give --source "
                f"{' or '.join(complete)}."
            )
        if not matches[source]:
            raise ValueError(
                f"neither Danbooru's nor Pixiv's layout: found the columns {listed}, missing for danbooru "
                f"{missing['danbooru']}, for pixiv {missing['pixiv']}. Name them with --map column=field."
            )
    elif matches[likeliest] > matches[source]:
        raise ValueError(f"{likeliest}'s layout, not {source}'s: found {listed}. Leave --source out.")
    if lacking := missing[source]:
        raise ValueError(
            f"not {source}'s layout: missing {lacking}, found {listed}. Name them with --map column=field."
        )
    return source


def recognise_metadata(columns: Collection[str], source: str = "auto") -> str:
    """The source of a file without pictures that has these columns. Raises ValueError if it is neither or has no id."""
    found = set(columns)
    matches = {name: len(found & site.TELLTALE_COLUMNS) for name, site in SITES.items()}
    if source == "auto":
        source = max(matches, key=lambda name: matches[name])
    if "id" not in found or not matches[source]:
        telltale = {name: sorted(site.TELLTALE_COLUMNS) for name, site in SITES.items()}
        raise ValueError(
            f"not the metadata of {' or '.join(SITES)}: it needs the column id and some of {telltale}; found "
            f"{sorted(found)}. Name them with --map column=field."
        )
    return source


def describe(schema: pa.Schema, source: str) -> str:
    """The variant of a source's layout, such as "danbooru, HF image struct, 5 tag categories, text ratings".

    Raises ValueError if no image column holds bytes.
    """
    return ", ".join([source, image_layout(schema), *SITES[source].variant(schema)])
