"""List, read and write the files of a dataset on local disk or S3.

A file appears whole or not at all: locally it is written under a temporary name, flushed and renamed; on S3 it is one
finished PUT or one completed upload of parts. So "finished" means "exists", and every job skips what is finished.
"""

import fcntl
import glob
import os
import re
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import S3Refused
from pipeline.storage import s3

_PARTIAL = re.compile(r"\.(.+)\.parquet\.[0-9a-f]{8}")
_PASSING = "hdm-passing-"
_COPIED_AT_ONCE = 16 << 20


class Listed(NamedTuple):
    """A file as a listing shows it."""

    size: int  # bytes
    written: float  # seconds, Unix
    stamp: str  # as Store.stamp


@dataclass(frozen=True)
class Store:
    """A folder of files: `root` is a local path or s3://bucket/prefix. Small enough to be sent to any worker.

    S3 settings come from the environment of each process, as for every AWS tool: AWS_ENDPOINT_URL, AWS_DEFAULT_REGION,
    AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_MAX_ATTEMPTS. HDM_S3_ANONYMOUS is 1, or the names of
    public buckets with commas between them: these are read without keys. A file on its way to S3, or the copy of one
    there, lies in TMPDIR while it is in use. Errors of S3 are core.errors.S3Refused and S3Unavailable, of one line each.
    """

    root: str

    def __post_init__(self) -> None:
        if self.is_remote:
            s3.check(self.root)
        elif "://" in self.root:
            raise S3Refused(f"{self.root} is neither a path here nor s3://bucket/prefix; give one of the two")
        else:
            object.__setattr__(self, "root", os.path.abspath(os.path.expanduser(self.root)))

    @property
    def is_remote(self) -> bool:
        return self.root.startswith("s3://")

    def path(self, name: str = "") -> str:
        """The full path of `name` (slash-separated, relative to the root)."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        path = self.path(name)
        return s3.exists(path) if self.is_remote else os.path.exists(path)

    def stamp(self, name: str = "") -> str:
        """What is another one when a file was written again."""
        if self.is_remote:
            return s3.etag(self.path(name))
        return _stamp(os.stat(self.path(name)))

    def shards(self, folder: str = "") -> list[str]:
        """Names without `.parquet` of the finished shards of a folder, sorted; none if there is no such folder."""
        list_folder = s3.list_folder if self.is_remote else os.listdir
        try:
            names = [PurePosixPath(entry).name for entry in list_folder(self.path(folder))]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name.removesuffix(".parquet") for name in names if _is_shard(name))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted; none if there is no such folder."""
        if self.is_remote:
            return s3.folders(self.path(folder))
        try:
            return sorted(entry.name for entry in os.scandir(self.path(folder)) if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self, name: str = "") -> BinaryIO:
        """Open for reading, with seeking."""
        path = self.path(name)
        if self.is_remote:
            return s3.open_file(path)
        # Arrow's own: its threads would need the interpreter for a file of Python's, and abort where that is ending.
        opened: BinaryIO = pa.OSFile(path, "rb")
        return opened

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        with self.committed(name) as path, open(path, "wb") as file:
            file.write(data)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[str]:
        """A local path that has the content of a file while the block lasts: its own, or a copy's from S3."""
        if not self.is_remote:
            yield self.path(name)
            return
        with _passing_file() as path:
            with self.open(name) as source, open(path, "wb") as copy:
                shutil.copyfileobj(source, copy, _COPIED_AT_ONCE)
            yield path

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file below a folder, by its name relative to that; none if there is no such folder."""
        return {name: listed.size for name, listed in self.listing(folder).items()}

    def listing(self, folder: str = "") -> dict[str, Listed]:
        """What is known of each file below a folder without opening it, by its name relative to that; none if there is
        no such folder."""
        root = self.path(folder)
        found = s3.listing(root) if self.is_remote else _listing_below(root)
        return {path.removeprefix(f"{root.rstrip('/')}/"): Listed(*about) for path, about in found.items()}

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        with self.open(name) as file:
            # Not pq.read_table: for small row groups it takes twice as long.
            table = pq.ParquetFile(file, pre_buffer=True).read(columns=columns)
        return table.select(columns) if columns else table  # in this order; KeyError where one is not there

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
        if self.is_remote:
            s3.remove(self.path(name))
        else:
            Path(self.path(name)).unlink(missing_ok=True)

    def remove_partial(self, folder: str, shards: Collection[str]) -> None:
        """Remove what a killed process left of these shards, half written; what a live one is writing stays. On S3
        nothing is left."""
        if self.is_remote or not self.exists(folder):
            return
        for entry in os.scandir(self.path(folder)):
            unfinished = _PARTIAL.fullmatch(entry.name)
            if unfinished and unfinished[1] in shards:
                _remove_unless_in_use(entry.path)

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
        with self.committed(name) as path, pq.ParquetWriter(path, schema, compression=compression) as writer:
            yield lambda rows: writer.write(rows.cast(schema))

    @contextmanager
    def committed(self, name: str) -> Iterator[str]:
        """A local path to write to; the file is committed under `name` when the block ends without an exception."""
        if self.is_remote:
            with _passing_file() as path:
                yield path
                s3.put(path, self.path(name))
            return
        target = self.path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{os.path.dirname(target)}/.{os.path.basename(target)}.{uuid.uuid4().hex[:8]}"  # as _PARTIAL
        with open(temporary, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # says that it is in use
            try:
                yield temporary
                os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise


@contextmanager
def _passing_file() -> Iterator[str]:
    """A new file for what goes to S3 or comes from there, removed at the end. Its lock says that it is in use."""
    folder = tempfile.gettempdir()
    _remove_orphans(folder)
    while True:
        file = tempfile.NamedTemporaryFile(prefix=_PASSING, dir=folder, delete=False)  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # another process took it for an orphan before it was locked
    with file:
        try:
            yield file.name
        finally:
            os.unlink(file.name)


@lru_cache(maxsize=1)
def _remove_orphans(folder: str) -> None:
    """Once per process: remove the files whose processes were killed; at up to a shard each they add up."""
    for path in glob.glob(f"{glob.escape(folder)}/{_PASSING}*"):
        _remove_unless_in_use(path)


def _remove_unless_in_use(path: str) -> None:
    with suppress(OSError), open(path, "rb") as file:  # locked, or another user's
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


def _is_shard(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith(".")


def find_parquet(path: str) -> list[str]:
    """Every parquet file at a path, sorted: itself, or all below a folder or s3:// prefix but for temporary ones."""
    store = Store(path)
    if store.is_remote:
        found = s3.find(store.root)
    else:
        found = [store.root] if os.path.isfile(store.root) else _files_below(store.root)
    return sorted(entry for entry in found if _is_shard(PurePosixPath(entry).name))


def _files_below(folder: str) -> list[str]:
    return [f"{where}/{name}" for where, _, names in os.walk(folder, followlinks=True) for name in names]


def _listing_below(folder: str) -> dict[str, tuple[int, float, str]]:
    listing = {}
    for path in _files_below(folder):
        with suppress(FileNotFoundError):  # another process removed it
            found = os.stat(path)
            listing[path] = found.st_size, found.st_mtime, _stamp(found)
    return listing


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"
