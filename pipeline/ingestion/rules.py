"""The rules of an ingest, and the rows of one raw file that become one shard under them."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Literal

import pyarrow as pa

from pipeline.pictures.decoder import DecodeLimits
from pipeline.sources import ADMISSIBLE, FIELDS
from pipeline.sources.reading import Reading, ReadingFlags
from pipeline.storage.fingerprints import digest

# Raise it whenever the same raw file and settings give other rows: every shard is then ingested again.
CODE_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class RawShard:
    """Rows of a raw file that become one shard."""

    path: str
    source: str
    shard: str  # name
    first_row: int
    rows: int
    row_bytes: int  # mean per row, uncompressed
    largest_group: int  # uncompressed bytes of the file's largest row group
    layout: str  # description of the source's variant
    digest: str  # hash of the footer: distinguishes files that would become the same shard
    stamp: str  # size and time, or the ETag on S3: changes when the file is written again
    renamed: tuple[tuple[str, str], ...]  # the entries of IngestRules.renamed that apply to this file
    reading: Reading = field(default_factory=Reading)


@dataclass(frozen=True, kw_only=True)
class IngestRules:
    """Everything besides its bytes that decides which rows a raw shard becomes."""

    admit: tuple[str, ...] = ()  # reasons of sources.ADMISSIBLE to ignore
    renamed: tuple[tuple[str, str], ...] = ()  # raw column, field of its source
    reading: ReadingFlags = field(default_factory=ReadingFlags)
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    downsize: int | None = None  # short side of the smaller tier in pixels; None writes no tier
    downsize_format: Literal["JPEG", "WEBP"] = "JPEG"

    def columns(self, found: Collection[str]) -> dict[str, str]:
        """Raw columns to read, each with the field it holds. A column replaced by a renamed one is left out.

        Raises ValueError if two columns would be the same field.
        """
        if len(set(found)) < len(found):
            raise ValueError(f"ambiguous: a column occurs twice in {sorted(found)}")
        named = {column: name for column, name in self.renamed if column in found}
        if len(set(named.values())) < len(named):
            raise ValueError(f"ambiguous: --map maps several of its columns, {sorted(named)}, to one field")
        taken = set(named.values())
        return {column: named.get(column, column) for column in found if column in named or column in FIELDS - taken}

    def named(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch with columns renamed to the fields they hold."""
        names = dict(self.renamed)
        return batch.rename_columns([names.get(column, column) for column in batch.schema.names])

    def settings(self, raw: RawShard) -> str:
        """The rules that can affect this file, as JSON with flags as keys."""
        return _settings(self, raw.source, raw.renamed, raw.reading)

    def fingerprint(self, raw: RawShard) -> str:
        """Digest of everything that decides the content of images/<shard>."""
        return digest([CODE_VERSION, raw.source, raw.digest, raw.first_row, raw.rows, self.settings(raw)])

    def tier_fingerprint(self, raw: RawShard) -> str:
        return digest([self.fingerprint(raw), self.downsize, self.downsize_format])

    def parts_fingerprint(self, raw: RawShard) -> str:
        """Digest of everything that decides the content of the shard's partial files, which hold the tier too."""
        # The stamp, because a file that was damaged on its way and is fetched again has the same footer.
        return digest([self.tier_fingerprint(raw) if self.downsize else self.fingerprint(raw), raw.stamp])


@lru_cache
def _settings(rules: IngestRules, source: str, renamed: tuple[tuple[str, str], ...], reading: Reading) -> str:
    admitted = sorted(set(rules.admit) & set(ADMISSIBLE[source]))
    settings = {"--admit": admitted, "--map": renamed, "limits": asdict(rules.limits)}
    if reading != Reading():
        # A tagger's classes are ten thousand names, and the settings are in every file's footer.
        labels = {name: digest(list(names)) for name, names in reading.labels}
        settings["columns"] = asdict(reading) | {"labels": labels}
    return json.dumps(settings)


def tier_folder(side: int) -> str:
    """Folder of the tier with this short side, within the dataset."""
    return f"images-{side}"
