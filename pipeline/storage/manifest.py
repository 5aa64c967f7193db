"""Manifests: what the footers of parquet files say, kept in one file per folder, so that a job opens only new files.

A manifest is a cache. Every entry carries the stamp of the file it was read from (see Store.stamp), and a listing says
which stamps are still right. So a manifest that is missing, old or damaged, and files that were changed by hand, cost
time and never change a result. A manifest is replaced as a whole; of several writers the last one wins.
"""

import base64
import gzip
import hashlib
import json
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import JobFailed, S3Refused, S3Unavailable, UsageError
from pipeline.core.progress import progress_bar
from pipeline.storage.fingerprints import Provenance, digest
from pipeline.storage.shards import FileInfo, Store, is_shard

NAME: Final = "manifest.json.gz"  # compressed for its checksum as well as its size

_FORMAT: Final = 2  # increment it when the meaning of an entry changes: all footers are then read again
_TAIL_BYTES: Final = 64 << 10  # holds most footers: a longer one costs a second request
_WHOLE: Final = 1 << 40  # bytes; more than any manifest has
_READERS: Final = 32  # on S3 they mostly wait
_SHOWN_FROM: Final = 1000  # files whose reading gets a progress bar
_COMPRESSION: Final = 3
_LFS: Final = b"version https://git-lfs."
_FEATURES: Final = b"huggingface"
_FOREIGN: Final = {b"ARROW:schema", b"pandas", _FEATURES}  # long metadata that no job needs


class Footer(NamedTuple):
    """What a parquet file's footer says. Rewriting the file with other rows changes the digest."""

    digest: str  # SHA-256 of the footer
    rows: int
    sources: frozenset[str] = frozenset()  # the sites in its column `source`, if it has one
    metadata: Mapping[str, str] = MappingProxyType({})  # key-value metadata, without Arrow's schema
    schema: pa.Schema = pa.schema([])  # without metadata
    features: str = ""  # hash of what Hugging Face's libraries say about the columns, such as the names of class labels
    row_bytes: int = 0  # mean per row, uncompressed
    largest_group: int = 0  # uncompressed bytes of the largest row group

    @property
    def provenance(self) -> Provenance:
        """What the file was made from; {} if it does not say."""
        made_from: Provenance = json.loads(self.metadata.get("made_from", "{}"))
        return made_from


class _Entry(NamedTuple):
    stamp: str
    bytes: int
    footer: Footer
    reasons: Mapping[str, int] | None = None  # rows by reason; None: not counted yet


class Manifest:
    """The footers of some parquet files by name, cached in the file `name` of `store`.

    `path_of` gives the full path of a file. `prune` drops the entries of files that are gone.
    """

    def __init__(self, store: Store, name: str, path_of: Callable[[str], str], prune: bool = True) -> None:
        self._store, self._name, self._path_of, self._prune = store, name, path_of, prune
        self._loaded: dict[str, _Entry] | None = None  # not before a footer is asked for
        self._files: Mapping[str, FileInfo] = {}
        self._changed = False

    def update(self, files: Mapping[str, FileInfo]) -> None:
        """Sets the files that exist now, as listed."""
        self._files = files
        if self._loaded is not None:
            self._drop_stale()

    @property
    def _entries(self) -> dict[str, _Entry]:
        if self._loaded is None:
            self._loaded = _load(self._store, self._name)
            self._drop_stale()
        return self._loaded

    def _drop_stale(self) -> None:
        """Drops the entries of files with another content, and, if told to prune, of files that are gone."""
        files = self._files
        stale = [
            name
            for name, entry in self._entries.items()
            if (files[name].stamp != entry.stamp if name in files else self._prune)
        ]
        for name in stale:
            del self._entries[name]
        self._changed |= bool(stale)

    def footers(self, names: Iterable[str]) -> tuple[dict[str, Footer], dict[str, str]]:
        """The footer of each of these files that exists, and the error of each that cannot be read. Opens only files
        without an entry. Raises S3Refused or S3Unavailable."""
        wanted = [name for name in dict.fromkeys(names) if name in self._files]
        errors = self._read([name for name in wanted if name not in self._entries], self._read_entry, "footers")
        return {name: self._entries[name].footer for name in wanted if name not in errors}, errors

    def reasons(self, names: Iterable[str]) -> tuple[dict[str, Counter[str]], dict[str, str]]:
        """Like `footers`: rows by the text in the column `reason`, without nulls."""
        found, errors = self.footers(names)
        errors |= self._read([name for name in found if self._entries[name].reasons is None], self._count, "reasons")
        return {name: Counter(self._entries[name].reasons) for name in found if name not in errors}, errors

    def _read(self, names: list[str], read: Callable[[str], _Entry], what: str) -> dict[str, str]:
        """Fills in entries by threads. Returns errors by name."""
        errors: dict[str, str] = {}
        if not names:
            return errors

        def attempt(name: str) -> _Entry | str:
            try:
                return read(name)
            except (OSError, pa.ArrowException, KeyError, ValueError) as error:
                return str(error).splitlines()[0].strip() if str(error) else type(error).__name__

        with ThreadPoolExecutor(min(_READERS, len(names))) as readers:
            found: Any = readers.map(attempt, names)
            if len(names) >= _SHOWN_FROM:
                found = progress_bar(found, len(names), f"reading {what}", "files")
            for name, entry in zip(names, found, strict=True):
                if isinstance(entry, str):
                    errors[name] = entry
                else:
                    self._entries[name], self._changed = entry, True
        return errors

    def _read_entry(self, name: str) -> _Entry:
        listed = self._files[name]
        return _Entry(listed.stamp, listed.size, read_footer(Store(self._path_of(name))))

    def _count(self, name: str) -> _Entry:
        return self._entries[name]._replace(reasons=dict(Store(self._path_of(name)).tally("", "reason")))

    def save(self) -> None:
        """Writes the manifest if it changed. A failure costs only time later: it is reported on stderr."""
        if not self._changed:
            return
        try:
            self._store.write(self._name, _dumped(self._entries))
            self._changed = False
        except (OSError, S3Refused, S3Unavailable) as error:
            print(f"cannot write {self._store.path(self._name)}, which saves time later: {error}", file=sys.stderr)


class Catalog:
    """The shards of a dataset by folder, with their footers. Each folder is listed once, until `refresh`.

    Methods that read footers raise JobFailed if a file is damaged.
    """

    def __init__(self, dataset: Store) -> None:
        self.dataset = dataset
        self._manifests: dict[str, Manifest] = {}
        self._shards: dict[str, list[str]] = {}

    def refresh(self, *folders: str) -> None:
        """Lists these folders (again), all at the same time."""
        with ThreadPoolExecutor(max(1, len(folders))) as threads:
            list(threads.map(self._refresh, folders))

    def _refresh(self, folder: str) -> None:
        files = {name: info for name, info in self.dataset.files(folder).items() if is_shard(name)}
        if folder not in self._manifests:
            self._manifests[folder] = folder_manifest(self.dataset, folder)
        self._manifests[folder].update(files)
        self._shards[folder] = sorted(name.removesuffix(".parquet") for name in files)

    def shards(self, folder: str) -> list[str]:
        """Sorted names of the finished shards of a folder."""
        if folder not in self._shards:
            self.refresh(folder)
        return self._shards[folder]

    def footers(self, folder: str, shards: Iterable[str]) -> dict[str, Footer]:
        """Footer of each of these shards that exists in the folder."""
        return self._each(folder, shards, Manifest.footers)

    def reasons(self, folder: str, shards: Iterable[str]) -> dict[str, Counter[str]]:
        """Rows by reason of each of these shards. Raises JobFailed if one is missing."""
        shards = set(shards)
        if missing := sorted(shards.difference(self.shards(folder))):
            raise JobFailed(
                f"{self.dataset.path(folder)} has no {missing[0]}.parquet, which belongs to a finished shard; remove "
                "that shard from all folders of the job and run it again"
            )
        return self._each(folder, shards, Manifest.reasons)

    def _each(self, folder: str, shards: Iterable[str], read: Callable[..., Any]) -> dict[str, Any]:
        existing = set(self.shards(folder))
        names = [f"{shard}.parquet" for shard in sorted(existing.intersection(shards))]
        found, errors = read(self._manifests[folder], names)
        for name, why in errors.items():
            path = self.dataset.path(f"{folder}/{name}")
            raise JobFailed(f"cannot read {path}: {why}; remove it and run the job that wrote it")
        return {name.removesuffix(".parquet"): value for name, value in found.items()}

    def images(self) -> dict[str, Footer]:
        """Footer of every image shard. Raises UsageError if the dataset has no images."""
        images = self.footers("images", self.shards("images"))
        if not images:
            command = f"python pipeline/ingest.py --raw PATH --dataset {shlex.quote(self.dataset.root)}"
            raise UsageError(f"{self.dataset.root} has no images; run: {command}")
        return images

    def provenance(self, folder: str, shards: Iterable[str]) -> dict[str, Provenance]:
        """Provenance of each of these shards that exists in the folder, {} for files without one."""
        return {shard: footer.provenance for shard, footer in self.footers(folder, shards).items()}

    def save(self) -> None:
        """Writes the manifests that changed."""
        for manifest in self._manifests.values():
            manifest.save()


def folder_manifest(dataset: Store, folder: str) -> Manifest:
    """The manifest of the shards in a folder of a dataset, by file name."""
    return Manifest(dataset, f"{folder}/{NAME}", lambda name: dataset.path(f"{folder}/{name}"))


def read_footer(file: Store) -> Footer:
    """The footer of the parquet file at the root of a Store, with one request if it is short. Raises OSError,
    ArrowInvalid, or ValueError for a pointer of Git LFS."""
    tail = file.tail("", _TAIL_BYTES)
    if tail.startswith(_LFS):
        raise ValueError("a Git LFS pointer in place of the file; fetch the file with: git lfs pull")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] == b"PAR1" and length > len(tail) == _TAIL_BYTES:
        tail = file.tail("", length)
    footer = pq.read_metadata(pa.BufferReader(tail))
    groups = [footer.row_group(number).total_byte_size for number in range(footer.num_row_groups)]
    schema = footer.schema.to_arrow_schema()
    return Footer(
        digest=hashlib.sha256(tail[-length:-8]).hexdigest(),
        rows=footer.num_rows,
        sources=frozenset(_sources(footer, schema)),
        metadata={k.decode(): v.decode() for k, v in (footer.metadata or {}).items() if k not in _FOREIGN},
        schema=schema.remove_metadata(),
        features=_features(footer.metadata or {}),
        row_bytes=sum(groups) // max(1, footer.num_rows),
        largest_group=max(groups, default=0),
    )


def _features(metadata: Mapping[bytes, bytes]) -> str:
    """Hash of the features, "" if there are none. Other parts of this metadata differ from file to file."""
    try:
        return digest(json.loads(metadata[_FEATURES])["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return ""


def _sources(footer: pq.FileMetaData, schema: pa.Schema) -> Iterable[str]:
    """The lowest and the highest source of each row group, from the column statistics."""
    if "source" in schema.names and footer.num_row_groups:
        column = next(i for i in range(footer.num_columns) if footer.schema.column(i).path == "source")
        for group in range(footer.num_row_groups):
            statistics = footer.row_group(group).column(column).statistics
            if statistics is not None and statistics.has_min_max:
                yield from (str(statistics.min), str(statistics.max))


def _load(store: Store, name: str) -> dict[str, _Entry]:
    """The entries of a manifest, {} if it cannot be used."""
    try:
        # One request, unlike `read`, so that another writer cannot replace the file in between.
        record = json.loads(gzip.decompress(store.tail(name, _WHOLE)))
        if record["format"] != _FORMAT:
            return {}
        schemas = [pa.ipc.read_schema(pa.BufferReader(base64.b64decode(schema))) for schema in record["schemas"]]
        return {name: _entry(fields, schemas) for name, fields in record["files"].items()}
    except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError, KeyError, TypeError, IndexError):
        return {}


def _entry(fields: list[Any], schemas: list[pa.Schema]) -> _Entry:
    stamp, size, digest, rows, sources, metadata, schema, features, row_bytes, largest_group, reasons = fields
    footer = Footer(digest, rows, frozenset(sources), metadata, schemas[schema], features, row_bytes, largest_group)
    return _Entry(stamp, size, footer, reasons)


def _dumped(entries: Mapping[str, _Entry]) -> bytes:
    schemas: dict[str, int] = {}
    numbers: dict[int, int] = {}  # of schemas by identity: most files share one object or a few
    files = {}
    for name, entry in sorted(entries.items()):
        footer = entry.footer
        number = numbers.get(id(footer.schema))
        if number is None:
            text = base64.b64encode(footer.schema.serialize().to_pybytes()).decode()
            number = numbers[id(footer.schema)] = schemas.setdefault(text, len(schemas))
        files[name] = [
            entry.stamp, entry.bytes, footer.digest, footer.rows, sorted(footer.sources), footer.metadata,
            number, footer.features, footer.row_bytes, footer.largest_group, entry.reasons,
        ]  # fmt: skip
    record = {"format": _FORMAT, "schemas": list(schemas), "files": files}
    return gzip.compress(json.dumps(record, separators=(",", ":")).encode(), _COMPRESSION, mtime=0)
