"""List, read and write the files of a dataset on local disk or S3.

A file appears whole or not at all: locally it is written under a temporary name, flushed and renamed; on S3 it is one
finished PUT. So "finished" means "exists", and every job skips what is finished.
"""

import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

_PARTIAL = re.compile(r"\.(.+)\.parquet\.[0-9a-f]{8}")


@lru_cache(maxsize=8)
def _filesystem(protocol: str) -> Any:
    return fsspec.filesystem(protocol)


@dataclass(frozen=True)
class Store:
    """A folder of files: `root` is a local path or s3://bucket/prefix. Small enough to be sent to any worker.

    S3 settings come from the environment, as for every AWS tool: AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID ...
    """

    root: str

    def __post_init__(self) -> None:
        if not self.is_remote:
            object.__setattr__(self, "root", os.path.abspath(os.path.expanduser(self.root)))

    @property
    def is_remote(self) -> bool:
        return self.root.startswith("s3://")

    @property
    def _files(self) -> Any:
        return _filesystem("s3" if self.is_remote else "file")

    def path(self, name: str = "") -> str:
        """The full path of `name` (slash-separated, relative to the root)."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        return bool(self._files.exists(self.path(name)))

    def shards(self, folder: str = "") -> list[str]:
        """Names without `.parquet` of the finished shards of a folder, sorted; none if there is no such folder."""
        self._files.invalidate_cache()
        if not self._files.isdir(self.path(folder)):
            return []
        names = (PurePosixPath(entry).name for entry in self._files.ls(self.path(folder), detail=False))
        return sorted(name.removesuffix(".parquet") for name in names if _is_shard(name))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted; none if there is no such folder."""
        self._files.invalidate_cache()
        if not self._files.isdir(self.path(folder)):
            return []
        entries = self._files.ls(self.path(folder), detail=True)
        return sorted(PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "directory")

    def open(self, name: str = "") -> BinaryIO:
        """Open for reading, with seeking."""
        # s3fs reads 50 MB ahead by default: whoever asked for the ids of a shard would be sent its pictures.
        ahead = {"cache_type": "none"} if self.is_remote else {}
        opened: BinaryIO = self._files.open(self.path(name), "rb", **ahead)
        return opened

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        with self._committed(name) as path, open(path, "wb") as file:
            file.write(data)

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        with self.open(name) as file:
            return pq.read_table(file, columns=columns)

    def rows(self, name: str) -> int:
        """The number of rows of a parquet file, from its footer."""
        with self.open(name) as file:
            return int(pq.read_metadata(file).num_rows)

    def metadata(self, name: str) -> dict[str, str]:
        """The key-value metadata of a parquet file's footer."""
        with self.open(name) as file:
            found = pq.read_metadata(file).metadata or {}
        return {key.decode(): value.decode() for key, value in found.items() if key != b"ARROW:schema"}

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""
        if self.exists(name):
            self._files.rm(self.path(name))

    def remove_partial(self, folder: str, shards: Collection[str]) -> None:
        """Remove what a killed process left of these shards, half written. On S3 nothing is left."""
        if self.is_remote or not self.exists(folder):
            return
        for entry in os.scandir(self.path(folder)):
            unfinished = _PARTIAL.fullmatch(entry.name)
            if unfinished and unfinished[1] in shards:
                os.unlink(entry.path)

    def tally(self, name: str, column: str) -> Counter[str]:
        """How often each text of a column occurs in a parquet file; nulls are not counted."""
        values = self.read_table(name, [column])[column].drop_null().value_counts().to_pylist()
        return Counter({entry["values"]: entry["counts"] for entry in values})

    def write_table(self, name: str, table: pa.Table | pa.RecordBatch, schema: pa.Schema, **metadata: str) -> None:
        """Write one parquet file of one row group; `metadata` is kept in the footer beside the schema's own."""
        with self.writing_table(name, schema, **metadata) as write:
            write(table)

    @contextmanager
    def writing_table(self, name: str, schema: pa.Schema, **metadata: str) -> Iterator[Callable[[Any], None]]:
        """A function that appends one row group; the file is committed when the block ends without an exception."""
        schema = schema.with_metadata((schema.metadata or {}) | {k.encode(): v.encode() for k, v in metadata.items()})
        # Pictures are compressed already: zstd would spend time on them and win nothing.
        compression = {column.name: "none" if pa.types.is_binary(column.type) else "zstd" for column in schema}
        with self._committed(name) as path, pq.ParquetWriter(path, schema, compression=compression) as writer:
            yield lambda rows: writer.write(rows.cast(schema))

    @contextmanager
    def _committed(self, name: str) -> Iterator[str]:
        """A local path to write to; the file is committed under `name` when the block ends without an exception."""
        if self.is_remote:
            with NamedTemporaryFile(suffix=".parquet") as file:
                yield file.name
                self._files.put_file(file.name, self.path(name))
            return
        target = self.path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{os.path.dirname(target)}/.{os.path.basename(target)}.{uuid.uuid4().hex[:8]}"  # as _PARTIAL
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise


def _is_shard(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith(".")


def find_parquet(path: str) -> list[str]:
    """Every parquet file at a path, sorted: itself, or all below a folder or s3:// prefix but for temporary ones."""
    store = Store(path)
    if path.endswith(".parquet"):
        return [store.root] if store.exists() else []
    found = store._files.find(store.root) if store.exists() else []
    scheme = "s3://" if store.is_remote else ""
    return sorted(f"{scheme}{entry}" for entry in found if _is_shard(PurePosixPath(entry).name))
