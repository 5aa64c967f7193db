"""Lists, reads and writes the files of a dataset on local disk or S3.

A file appears whole or not at all: locally it is written under a temporary name, flushed and renamed; on S3 it is one
PUT or one completed multipart upload. So a file that exists is finished, and every job skips finished files.
"""

import errno
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
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import S3Refused
from pipeline.storage import s3
from pipeline.storage.reachability import is_network_error

_PARTIAL = re.compile(r"\.(.+)\.parquet\.[0-9a-f]{8}")
_TRANSFER_PREFIX = "hdm-passing-"
_COPY_BYTES = 16 << 20


class FileInfo(NamedTuple):
    size: int  # bytes
    modified: float  # Unix seconds
    stamp: str  # as Store.stamp


@dataclass(frozen=True)
class Store:
    """A folder of files: `root` is a local path or s3://bucket/prefix. Small enough to be sent to any worker.

    S3 is configured by the environment of each process, as for every AWS tool: AWS_ENDPOINT_URL, AWS_DEFAULT_REGION,
    AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_MAX_ATTEMPTS. HDM_S3_ANONYMOUS is 1, or the names of
    public buckets separated by commas, which are read without keys. Uploads and local copies are staged in TMPDIR.
    S3 errors are raised as core.errors.S3Refused and S3Unavailable, each with a one-line message.
    """

    root: str

    def __post_init__(self) -> None:
        if self.is_remote:
            s3.check(self.root)
        elif "://" in self.root:
            raise S3Refused(f"{self.root} is neither a local path nor s3://bucket/prefix; give one of the two")
        else:
            object.__setattr__(self, "root", os.path.abspath(os.path.expanduser(self.root)))

    @property
    def is_remote(self) -> bool:
        return self.root.startswith("s3://")

    def path(self, name: str = "") -> str:
        """The full path of `name`, which is relative to the root and uses slashes."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        path = self.path(name)
        return s3.exists(path) if self.is_remote else os.path.exists(path)

    def stamp(self, name: str = "") -> str:
        """A value that changes when the file is rewritten: the ETag on S3, size and time locally."""
        return s3.etag(self.path(name)) if self.is_remote else _stamp(os.stat(self.path(name)))

    def shards(self, folder: str = "") -> list[str]:
        """Sorted names, without `.parquet`, of the finished shards in a folder; [] if there is no such folder."""
        return sorted(name.removesuffix(".parquet") for name in self._entries(folder)[0] if is_shard(name))

    def folders(self, folder: str) -> list[str]:
        """Sorted names of the folders in a folder; [] if there is no such folder."""
        return sorted(self._entries(folder)[1])

    def files(self, folder: str = "") -> dict[str, FileInfo]:
        """The files directly in a folder, by name; {} if there is no such folder. Costs one listing."""
        return {name: FileInfo(*info) for name, info in self._entries(folder)[0].items()}

    def _entries(self, folder: str) -> tuple[dict[str, tuple[int, float, str]], list[str]]:
        """Files with their FileInfo, and names of folders."""
        path = self.path(folder)
        try:
            return s3.entries(path) if self.is_remote else _local_entries(path)
        except (FileNotFoundError, NotADirectoryError):
            return {}, []

    def open(self, name: str = "") -> BinaryIO:
        """Opens a seekable file for reading."""
        path = self.path(name)
        if self.is_remote:
            return s3.open_file(path)
        # Arrow's own file: with a Python file, Arrow's threads need the interpreter and abort while it shuts down.
        opened: BinaryIO = pa.OSFile(path, "rb")
        return opened

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def tail(self, name: str, size: int) -> bytes:
        """The last `size` bytes of a file, or all of a shorter file; one request on S3."""
        if self.is_remote:
            return s3.tail(self.path(name), size)
        with open(self.path(name), "rb") as file:
            file.seek(-min(size, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        with self.committed(name) as path, open(path, "wb") as file:
            file.write(data)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[str]:
        """A local path with the content of a file, valid inside the block. Copies only from S3."""
        if not self.is_remote:
            yield self.path(name)
            return
        with _transfer_file() as path:
            with self.open(name) as source, open(path, "wb") as copy:
                shutil.copyfileobj(source, copy, _COPY_BYTES)
            yield path

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file below a folder, by its name relative to the folder; {} if there is no such folder."""
        return {name: info.size for name, info in self.listing(folder).items()}

    def listing(self, folder: str = "") -> dict[str, FileInfo]:
        """Like `sizes`, with all that is known without opening the files."""
        root = self.path(folder)
        found = s3.listing(root) if self.is_remote else _listing_below(root)
        return {path.removeprefix(f"{root.rstrip('/')}/"): FileInfo(*info) for path, info in found.items()}

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Columns come in the given order. Raises KeyError if one is missing."""
        with self.open(name) as file:
            # pq.read_table takes twice as long for small row groups.
            table = pq.ParquetFile(file, pre_buffer=True).read(columns=columns)
        return table.select(columns) if columns else table

    def rows(self, name: str) -> int:
        """The number of rows of a parquet file, from its footer."""
        with self.open(name) as file:
            return int(pq.read_metadata(file).num_rows)

    def metadata(self, name: str) -> dict[str, str]:
        """The key-value metadata of a parquet file's footer."""
        with self.open(name) as file:
            found = pq.read_metadata(file).metadata or {}
        return {key.decode(): value.decode() for key, value in found.items() if key != b"ARROW:schema"}

    def tally(self, name: str, column: str) -> Counter[str]:
        """Occurrences of each text in a column of a parquet file, without nulls."""
        values = self.read_table(name, [column])[column].drop_null().value_counts().to_pylist()
        return Counter({entry["values"]: entry["counts"] for entry in values})

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""
        if self.is_remote:
            s3.remove(self.path(name))
        else:
            Path(self.path(name)).unlink(missing_ok=True)

    def remove_partial(self, folder: str, shards: Collection[str]) -> None:
        """Removes unfinished files of these shards that a killed process left behind, but not those being written. S3
        has none."""
        if self.is_remote or not self.exists(folder):
            return
        for entry in os.scandir(self.path(folder)):
            unfinished = _PARTIAL.fullmatch(entry.name)
            if unfinished and unfinished[1] in shards:
                _remove_unless_locked(entry.path)

    def write_table(self, name: str, table: pa.Table | pa.RecordBatch, schema: pa.Schema, **metadata: str) -> None:
        """Writes a parquet file of one row group, with `metadata` in the footer beside the schema's own."""
        with self.writing_table(name, schema, **metadata) as write:
            write(table)

    @contextmanager
    def writing_table(self, name: str, schema: pa.Schema, **metadata: str) -> Iterator[Callable[[Any], None]]:
        """Yields a function that appends a row group; the file is committed if the block ends without an exception."""
        schema = schema.with_metadata((schema.metadata or {}) | {k.encode(): v.encode() for k, v in metadata.items()})
        # Images are compressed already.
        compression = {column.name: "none" if pa.types.is_binary(column.type) else "zstd" for column in schema}
        with self.committed(name) as path, pq.ParquetWriter(path, schema, compression=compression) as writer:
            yield lambda rows: writer.write(rows.cast(schema))

    @contextmanager
    def committed(self, name: str) -> Iterator[str]:
        """Yields a local path to write to; the file appears under `name` if the block ends without an exception."""
        if self.is_remote:
            with _transfer_file() as path:
                yield path
                s3.put(path, self.path(name))
            return
        target = self.path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{os.path.dirname(target)}/.{os.path.basename(target)}.{uuid.uuid4().hex[:8]}"  # as _PARTIAL
        with open(temporary, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # marks it as being written
            try:
                yield temporary
                os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise


@contextmanager
def _transfer_file() -> Iterator[str]:
    """A temporary file on its way to or from S3, locked while it is in use."""
    folder = tempfile.gettempdir()
    _remove_orphans(folder)
    while True:
        file = tempfile.NamedTemporaryFile(prefix=_TRANSFER_PREFIX, dir=folder, delete=False)  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # another process removed it as an orphan before it was locked
    with file:
        try:
            yield file.name
        finally:
            os.unlink(file.name)


@lru_cache(maxsize=1)
def _remove_orphans(folder: str) -> None:
    """Removes the transfer files of killed processes, once per process: each can be as large as a shard."""
    for path in glob.glob(f"{glob.escape(folder)}/{_TRANSFER_PREFIX}*"):
        _remove_unless_locked(path)


def _remove_unless_locked(path: str) -> None:
    with suppress(OSError), open(path, "rb") as file:  # OSError: locked, or another user's
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


def is_shard(name: str) -> bool:
    """Whether a file name is that of a finished shard."""
    return name.endswith(".parquet") and not name.startswith(".")


def list_files(path: str) -> dict[str, FileInfo]:
    """The file at a path, or all files below a folder or s3:// prefix, by full path; {} if there are none."""
    root = Store(path).root
    if root.startswith("s3://"):
        found = s3.listing(root)
    else:
        found = {root: _file_info(os.stat(root))} if os.path.isfile(root) else _listing_below(root)
    return {name: FileInfo(*info) for name, info in found.items()}


def _local_entries(folder: str) -> tuple[dict[str, tuple[int, float, str]], list[str]]:
    files, folders = {}, []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # removed by another process
            if entry.is_dir():
                folders.append(entry.name)
            else:
                files[entry.name] = _file_info(entry.stat())
    return files, folders


def _files_below(folder: str) -> list[str]:
    walked = os.walk(folder, followlinks=True, onerror=_raise_outage)
    return [f"{where}/{name}" for where, _, names in walked for name in names]


def _raise_outage(error: OSError) -> None:
    """os.walk takes a folder that cannot be read for an empty one. One that may be there again in a moment is not."""
    if error.errno == errno.EIO or is_network_error(error):
        raise error


def _listing_below(folder: str) -> dict[str, tuple[int, float, str]]:
    listing = {}
    for path in _files_below(folder):
        with suppress(FileNotFoundError):  # removed by another process
            listing[path] = _file_info(os.stat(path))
    return listing


def _file_info(found: os.stat_result) -> tuple[int, float, str]:
    return found.st_size, found.st_mtime, _stamp(found)


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"
