"""What the folders of a dataset hold. Each scan costs one listing: only new and changed shards are opened."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.storage.shards import FileInfo, Store

_READERS = 8  # on S3 they mostly wait
_NAMED = ("captions", "scores", "selections")  # have a folder per name


@dataclass
class Holding:
    """The content of one folder."""

    shards: int = 0  # finished
    rows: int = 0  # of the shards
    reasons: Counter[str] = field(default_factory=Counter)  # of captions and rejected rows that have one
    unreadable: int = 0  # shards
    bytes: int = 0  # of all files in the folder and below, also of unfinished ones
    newest: float | None = None  # Unix time at which the last shard was written


class Inventory:
    """The folders of one dataset. Remembers the shards of the last scan."""

    def __init__(self, store: Store) -> None:
        self.store = store
        # By (file, stamp): number of rows, and rows by reason.
        self._known: dict[tuple[str, str], tuple[int, Counter[str]]] = {}

    def scan(self) -> dict[str, Holding] | None:
        """By folder: images, images-<side>, rejected, captions, captions/<name>, scores/<name>, selections/<name>.

        None if there is no dataset. Raises OSError, S3Refused or S3Unavailable if it cannot be listed.
        """
        listing = self.store.listing()
        if "dataset.json" not in listing:
            return None
        found: dict[str, Holding] = {}
        shards: dict[str, FileInfo] = {}
        for name, listed in listing.items():
            if folder := folder_of(name):
                holding = found.setdefault(folder, Holding())
                holding.bytes += listed.size
                if is_shard(name, folder):
                    shards[name] = listed
                    holding.shards += 1
                    holding.newest = max(holding.newest or 0.0, listed.modified)
        self._read(shards)
        for name, listed in shards.items():
            holding, content = found[folder_of(name)], self._known.get((name, listed.stamp))
            if content is None:
                holding.unreadable += 1
            else:
                holding.rows += content[0]
                holding.reasons += content[1]
        return found

    def _read(self, shards: Mapping[str, FileInfo]) -> None:
        """Reads shards that are new or were written again. An unreadable one is tried again in the next scan."""
        keys = [(name, listed.stamp) for name, listed in shards.items()]
        self._known = {key: self._known[key] for key in keys if key in self._known}

        def read(key: tuple[str, str]) -> None:
            try:
                self._known[key] = self._content(key[0])
            except (pa.ArrowException, OSError, KeyError):
                return

        with ThreadPoolExecutor(_READERS) as readers:
            list(readers.map(read, [key for key in keys if key not in self._known]))

    def _content(self, name: str) -> tuple[int, Counter[str]]:
        """Reads the footer of a shard, or its column of reasons, which is small."""
        if folder_of(name).partition("/")[0] not in ("captions", "rejected"):
            return self.store.rows(name), Counter()
        reasons = self.store.read_table(name, ["reason"])["reason"]
        return len(reasons), Counter(reasons.drop_null().to_pylist())


def folder_of(name: str) -> str:
    """The dataset's folder that a file belongs to, at any depth; "" for files of the dataset itself."""
    first, *more = name.split("/")
    if not more:
        return ""
    named = first in _NAMED and len(more) > 1 and not (first == "captions" and more[0] == "partial")
    return f"{first}/{more[0]}" if named else first


def is_shard(name: str, folder: str) -> bool:
    """True for a finished shard of the folder itself, not of a folder below such as judged/ or partial/."""
    file = name.removeprefix(f"{folder}/")
    return "/" not in file and file.endswith(".parquet") and not file.startswith(".")
