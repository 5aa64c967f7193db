"""What the folders of a dataset hold. Each scan costs one listing: only new and changed shards are opened, and at the
first scan only those that are not in the folders' manifests."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from pipeline.storage.manifest import Manifest, folder_manifest
from pipeline.storage.shards import FileInfo, Store, is_shard

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
    """The folders of one dataset. Remembers the shards of the last scan, and writes nothing."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._manifests: dict[str, Manifest] = {}  # by folder

    def scan(self) -> dict[str, Holding] | None:
        """By folder: images, images-<side>, rejected, captions, captions/<name>, scores/<name>, selections/<name>.

        None if there is no dataset. Raises OSError, S3Refused or S3Unavailable if it cannot be listed or read.
        """
        listing = self.store.listing()
        if "dataset.json" not in listing:
            return None
        found: dict[str, Holding] = {}
        shards: dict[str, dict[str, FileInfo]] = defaultdict(dict)  # by folder
        for name, info in listing.items():
            if matched := _FILE.fullmatch(name):
                folder, file = matched.groups()
                holding = found.setdefault(folder, Holding())
                holding.bytes += info.size
                # Files in folders below, such as judged/ and partial/, are no shards of their own.
                if "/" not in file and is_shard(file):
                    shards[folder][file] = info
                    holding.shards += 1
                    holding.newest = max(holding.newest or 0.0, info.modified)
        for folder, holding in found.items():
            self._read(folder, shards[folder], holding)
        return found

    def _read(self, folder: str, shards: dict[str, FileInfo], holding: Holding) -> None:
        """Counts the rows and reasons of a folder. The next scan retries unreadable shards."""
        if folder not in self._manifests:
            self._manifests[folder] = folder_manifest(self.store, folder)
        manifest = self._manifests[folder]
        manifest.update(shards)
        footers, errors = manifest.footers(shards)
        if folder.partition("/")[0] in ("captions", "rejected"):
            reasons, errors = manifest.reasons(shards)
            holding.reasons = sum(reasons.values(), Counter[str]())
        holding.unreadable = len(errors)
        holding.rows = sum(footer.rows for name, footer in footers.items() if name not in errors)
