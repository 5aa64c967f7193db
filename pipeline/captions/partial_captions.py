"""Finished rows of an unfinished shard, in files of a few hundred rows: a killed job loses no more than one file."""

import json
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.captions.tag_captions import write_captions
from pipeline.storage.fingerprints import Provenance
from pipeline.storage.shards import Store


@dataclass(frozen=True)
class PartialShard:
    """The files of one shard, in a folder that has no others. The metadata of each says what it was made from."""

    store: Store
    folder: str
    provenance: Provenance

    def read(self) -> dict[str, dict[str, Any]]:
        """Rows by id. Removes files with another provenance."""
        rows: dict[str, dict[str, Any]] = {}
        for name in (f"{self.folder}/{file}.parquet" for file in self.store.shards(self.folder)):
            if json.loads(self.store.metadata(name).get("made_from", "{}")) == self.provenance:
                rows |= {row["id"]: row for row in self.store.read_table(name).to_pylist()}
            else:
                self.store.remove(name)
        return rows

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write one more file, unless there are no rows."""
        if rows:
            write_captions(self.store, f"{self.folder}/{uuid.uuid4().hex}.parquet", rows, self.provenance)

    def remove(self) -> None:
        """Remove all files, and the temporary files of killed processes."""
        for file in self.store.shards(self.folder):
            self.store.remove(f"{self.folder}/{file}.parquet")
        if not self.store.is_remote:
            shutil.rmtree(self.store.path(self.folder), ignore_errors=True)
            with suppress(OSError):  # other shards are unfinished
                os.rmdir(os.path.dirname(self.store.path(self.folder)))
