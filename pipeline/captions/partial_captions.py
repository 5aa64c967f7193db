"""Finished rows of a shard that is not finished: files of some hundred rows each: a killed job loses no more."""

import json
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.storage.fingerprints import MadeFrom
from pipeline.storage.shards import Store


@dataclass(frozen=True)
class Unfinished:
    """The files of one shard, in a folder of its own. Each tells what it was made from."""

    store: Store
    folder: str
    schema: pa.Schema
    made_from: MadeFrom

    def read(self) -> dict[str, dict[str, Any]]:
        """Rows by id. Files that were made from something else are removed."""
        rows: dict[str, dict[str, Any]] = {}
        for name in (f"{self.folder}/{file}.parquet" for file in self.store.shards(self.folder)):
            if json.loads(self.store.metadata(name).get("made_from", "{}")) == self.made_from:
                rows |= {row["id"]: row for row in self.store.read_table(name).to_pylist()}
            else:
                self.store.remove(name)
        return rows

    def write(self, rows: list[dict[str, Any]]) -> None:
        """One more file; nothing for no rows."""
        if rows:
            table = pa.RecordBatch.from_pylist(rows, self.schema)
            made = json.dumps(self.made_from)
            self.store.write_table(f"{self.folder}/{uuid.uuid4().hex}.parquet", table, self.schema, made_from=made)

    def remove(self) -> None:
        """All files, and what a killed process left half written."""
        for file in self.store.shards(self.folder):
            self.store.remove(f"{self.folder}/{file}.parquet")
        if not self.store.is_remote:
            shutil.rmtree(self.store.path(self.folder), ignore_errors=True)
            with suppress(OSError):  # other shards are unfinished
                os.rmdir(os.path.dirname(self.store.path(self.folder)))
