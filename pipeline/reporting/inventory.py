"""What a dataset holds, by state, at the price of one listing: what was read of a file once is not read again."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.storage.shards import Listed, Store

_READERS = 8  # most of it is waiting for S3
_NAMED = ("captions", "scores", "selections")  # their folders hold others, each with a name


@dataclass
class Holding:
    """Of one folder."""

    shards: int = 0  # finished
    rows: int = 0  # of these
    reasons: Counter[str] = field(default_factory=Counter)  # of captions and rejected rows, of those that have one
    unreadable: int = 0  # shards
    bytes: int = 0  # of all files in the folder and below, also of half-written ones
    newest: float | None = None  # when the last shard was written: seconds, Unix


@dataclass(frozen=True)
class _Content:
    """Of one shard."""

    rows: int
    reasons: Counter[str]


class Inventory:
    """Of one dataset, kept by looking again and again."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known: dict[tuple[str, str], _Content] = {}  # by name and stamp of the file

    def look(self) -> dict[str, Holding] | None:
        """By folder: images, images-<side>, rejected, captions, captions/<name>, scores/<name>, selections/<name>. None
        where there is no dataset. OSError, S3Refused or S3Unavailable where it cannot be listed.
        """
        listing = self.store.listing()
        if "dataset.json" not in listing:
            return None
        found: dict[str, Holding] = {}
        shards: dict[str, Listed] = {}
        for name, listed in listing.items():
            if folder := folder_of(name):
                holding = found.setdefault(folder, Holding())
                holding.bytes += listed.size
                if is_shard(name, folder):
                    shards[name] = listed
                    holding.shards += 1
                    holding.newest = max(holding.newest or 0.0, listed.written)
        self._read(shards)
        for name, listed in shards.items():
            holding, content = found[folder_of(name)], self._known.get((name, listed.stamp))
            if content is None:
                holding.unreadable += 1
            else:
                holding.rows += content.rows
                holding.reasons += content.reasons
        return found

    def _read(self, shards: Mapping[str, Listed]) -> None:
        """Those that are new or were written again; one that cannot be read is tried again at the next look."""
        self._known = {key: self._known[key] for key in _keys(shards) if key in self._known}

        def read(key: tuple[str, str]) -> None:
            try:
                self._known[key] = _content(self.store, key[0])
            except (pa.ArrowException, OSError, KeyError):
                return

        with ThreadPoolExecutor(_READERS) as readers:
            list(readers.map(read, [key for key in _keys(shards) if key not in self._known]))


def _keys(shards: Mapping[str, Listed]) -> list[tuple[str, str]]:
    return [(name, listed.stamp) for name, listed in shards.items()]


def _content(store: Store, name: str) -> _Content:
    """From the file's footer, or from its one small column of reasons."""
    if folder_of(name).partition("/")[0] not in ("captions", "rejected"):
        return _Content(store.rows(name), Counter())
    reasons = store.read_table(name, ["reason"])["reason"]
    return _Content(len(reasons), Counter(reasons.drop_null().to_pylist()))


def folder_of(name: str) -> str:
    """Of the dataset's folders the one that a file belongs to, at whatever depth; "" for files beside them."""
    first, *more = name.split("/")
    if not more:
        return ""
    named = first in _NAMED and len(more) > 1 and not (first == "captions" and more[0] == "partial")
    return f"{first}/{more[0]}" if named else first


def is_shard(name: str, folder: str) -> bool:
    """A finished shard, and not one of the files below that others are made from (judged, partial ...)."""
    file = name.removeprefix(f"{folder}/")
    return "/" not in file and file.endswith(".parquet") and not file.startswith(".")
