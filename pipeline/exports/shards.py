"""One shard of a selection -> a tar, a folder of files, or a parquet file. Knows nothing of Ray.

A shard appears whole or not at all, and a finished one is left as it is.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.records import TEXT_CATEGORIES
from pipeline.storage.row_reader import open_parquet, read_rows
from pipeline.storage.shards import Store

Format = Literal["webdataset", "kohya", "hf"]
Text = Literal["full", "tags", "caption"]

_SUFFIXES: Final = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "AVIF": "avif"}
_COLUMNS: Final = ["id", "image", "format", "width", "height"]
_GROUP_BYTES: Final = 64 << 20  # of a row group
_HF_SCHEMA: Final = pa.schema(
    [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *(pa.field(name, pa.string()) for name in ("text", "id", "caption", "quality", "era", "rating")),
        *(pa.field(category, pa.list_(pa.string())) for category in TEXT_CATEGORIES),
        *(pa.field(name, pa.int32()) for name in ("width", "height")),
    ],
    # How Hugging Face's datasets know that the column holds pictures.
    metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})},
)


@dataclass(frozen=True)
class ExportShard:
    """A shard of a selection."""

    dataset: str
    selection: str
    shard: str
    rows: int


@dataclass(frozen=True)
class Example:
    """A picture with what is known of it."""

    key: str  # file name without suffix: the id with _ for :
    suffix: str
    image: bytes
    text: str
    about: dict[str, Any]  # row of SELECTION, and the picture's width and height


def text_of(row: dict[str, Any], text: Text) -> str:
    """The text of a row of SELECTION, in the trainer's order: special tags, character, copyright, artist, general, then
    the caption, then quality, era, rating and meta words."""
    words = [row[name] for name in ("quality", "era", "rating") if row[name]]
    caption = [row["caption"].strip().removesuffix(".")] if row["caption"] else []
    tags = [tag for category in TEXT_CATEGORIES if category != "meta" for tag in row[category]]
    if text == "caption":
        return (row["caption"] or "").strip()
    return ", ".join([*tags, *(caption if text == "full" else []), *words, *row["meta"]])


def examples(part: ExportShard, text: Text) -> Iterator[Example]:
    """The pictures of a shard, in the order of the selection."""
    store = Store(part.dataset)
    selected = store.read_table(f"selections/{part.selection}/{part.shard}.parquet").drop_columns(["row"])
    numbers = store.read_table(f"selections/{part.selection}/{part.shard}.parquet", ["row"])["row"].to_numpy()
    done = 0
    with open_parquet(store.path(f"images/{part.shard}.parquet")) as parquet:
        for found, batch in read_rows(parquet, numbers.astype(np.int32), _COLUMNS):
            rows = selected.slice(done, len(found)).to_pylist()
            done += len(found)
            for row, picture in zip(rows, batch.to_pylist(), strict=True):
                if row["id"] != picture["id"]:
                    raise ValueError(
                        f"images/{part.shard}.parquet was ingested again since the selection; run pipeline/curate.py"
                    )
                about = row | {"width": picture["width"], "height": picture["height"]}
                key, suffix = row["id"].replace(":", "_"), _SUFFIXES[picture["format"]]
                yield Example(key, suffix, picture["image"], text_of(row, text), about)


def export_shard(part: ExportShard, out: Path, to: Format, text: Text) -> None:
    """Writes a shard, unless it is finished."""
    target = path_of(out, part.shard, to)
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed job
    partial.unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[to](partial, examples(part, text))
    partial.replace(target)


def path_of(out: Path, shard: str, to: Format) -> Path:
    """The file or folder that a shard becomes."""
    return {"webdataset": out / f"{shard}.tar", "kohya": out / shard, "hf": out / "data" / f"{shard}.parquet"}[to]


def _write_tar(path: Path, found: Iterator[Example]) -> None:
    """Members KEY.jpg, KEY.txt and KEY.json, one after the other, as WebDataset groups them."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for example in found:
            about = json.dumps(example.about, ensure_ascii=False).encode()
            members = {example.suffix: example.image, "txt": example.text.encode(), "json": about}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{example.key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _write_files(path: Path, found: Iterator[Example]) -> None:
    path.mkdir()
    for example in found:
        (path / f"{example.key}.{example.suffix}").write_bytes(example.image)
        (path / f"{example.key}.txt").write_text(example.text + "\n", encoding="utf-8")


def _write_parquet(path: Path, found: Iterator[Example]) -> None:
    rows, size = [], 0
    with pq.ParquetWriter(path, _HF_SCHEMA, compression="zstd") as writer:
        for example in found:
            image = {"bytes": example.image, "path": f"{example.key}.{example.suffix}"}
            rows.append(example.about | {"image": image, "text": example.text})
            size += len(example.image)
            if size >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, _HF_SCHEMA))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, _HF_SCHEMA))


_WRITERS: Final[dict[Format, Callable[[Path, Iterator[Example]], None]]] = {
    "webdataset": _write_tar,
    "kohya": _write_files,
    "hf": _write_parquet,
}
