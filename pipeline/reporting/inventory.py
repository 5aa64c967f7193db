"""What the folders of a dataset hold. Each scan costs one listing: only new and changed shards are opened."""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.storage.shards import Store

_READERS = 8  # on S3 they mostly wait
# The folder of the dataset that a file belongs to, and the file in it. captions/, scores/ and selections/ have a folder
# per name; captions/partial/ belongs to captions/.
_FILE = re.compile(r"(captions/(?!partial/)[^/]+|scores/[^/]+|selections/[^/]+|[^/]+)/(.+)")


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
        shards: dict[tuple[str, str], Holding] = {}  # by (file, stamp)
        for name, info in listing.items():
            if matched := _FILE.fullmatch(name):
                folder, file = matched.groups()
                holding = found.setdefault(folder, Holding())
                holding.bytes += info.size
                # Files in folders below, such as judged/ and partial/, are no shards of their own.
                if "/" not in file and file.endswith(".parquet") and not file.startswith("."):
                    shards[name, info.stamp] = holding
                    holding.shards += 1
                    holding.newest = max(holding.newest or 0.0, info.modified)
        self._known = {key: self._known[key] for key in shards if key in self._known}
        with ThreadPoolExecutor(_READERS) as readers:
            list(readers.map(self._read, [key for key in shards if key not in self._known]))
        for key, holding in shards.items():
            rows, reasons = self._known.get(key, (0, Counter[str]()))
            holding.unreadable += key not in self._known
            holding.rows += rows
            holding.reasons += reasons
        return found

    def _read(self, key: tuple[str, str]) -> None:
        """Reads the footer of a shard or, for reasons, one small column. The next scan retries an unreadable shard."""
        name = key[0]
        try:
            if name.startswith(("captions/", "rejected/")):
                reasons = self.store.read_table(name, ["reason"])["reason"]
                self._known[key] = len(reasons), Counter(reasons.drop_null().to_pylist())
            else:
                self._known[key] = self.store.rows(name), Counter()
        except (pa.ArrowException, OSError, KeyError):
            return
