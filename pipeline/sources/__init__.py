"""Raw rows of each site -> `records.Post`, nothing else. Field names and rules are those of the sites' own APIs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipeline.records import Post, Rejected
from pipeline.sources import danbooru, pixiv

READERS: dict[str, Callable[[Mapping[str, Any]], Post | Rejected]] = {
    "danbooru": danbooru.read_row,
    "pixiv": pixiv.read_row,
}
_MISSING: dict[str, Callable[[set[str]], list[str]]] = {
    "danbooru": danbooru.missing_columns,
    "pixiv": pixiv.missing_columns,
}
_TELLTALE = {"danbooru": danbooru.TELLTALE_COLUMNS, "pixiv": pixiv.TELLTALE_COLUMNS}


def recognise(columns: Iterable[str], source: str = "auto") -> str:
    """The source whose layout these columns have.

    Raises ValueError, naming the columns that are missing and those that were found, where they are no such layout.
    """
    found = set(columns)
    telling = {name: len(found & telltale) for name, telltale in _TELLTALE.items()}
    likeliest = max(telling, key=lambda name: telling[name])
    if source == "auto":
        source = likeliest
        if not telling[source]:
            raise ValueError(
                f"neither Danbooru's nor Pixiv's layout: found the columns {sorted(found)}, missing for danbooru "
                f"{danbooru.missing_columns(found)}, for pixiv {pixiv.missing_columns(found)}"
            )
    elif telling[likeliest] > telling[source]:
        raise ValueError(f"{likeliest}'s layout, not {source}'s: found {sorted(found)}; leave --source out")
    missing = _MISSING[source](found)
    if missing:
        raise ValueError(f"not {source}'s layout: missing {missing}, found {sorted(found)}")
    return source
