"""Steps of the row pipeline, from rows of images to partial files of captions: read, decode, caption, write.

They know nothing of Ray. See pipeline/core/row_pipeline.py.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from captioner.requests import CaptionRequest
from pipeline.captions.model_captions import Captioner, CaptionTask, PendingRow
from pipeline.captions.stats import RowCounts, report
from pipeline.captions.tag_captions import TAG_COLUMNS, ImageShard, caption_row, request_from_row
from pipeline.core.records import CAPTIONS
from pipeline.core.tables import DIED, REPORT, ROW, SHARD, with_constants
from pipeline.pictures.containers import RejectReason
from pipeline.pictures.decoder import Refused, decode
from pipeline.pictures.memory_limit import memory_limit
from pipeline.storage.partial import PartialShard
from pipeline.storage.posts import read_images
from pipeline.storage.row_reader import open_parquet, read_rows
from pipeline.storage.shards import Store
from pipeline.tagging.tags import TagReader

KIND: Final = "captions"  # of the partial files
MADE_FROM: Final = "hdm_made_from"  # of the row's partial file
ATTEMPTS: Final = "hdm_attempts"  # of earlier jobs

_MIN_SIDE: Final = 16  # pixels: one patch of Pixtral
_DECODED: Final = pa.schema(
    [
        pa.field(SHARD, pa.string()),
        pa.field(ROW, pa.int32()),
        pa.field(MADE_FROM, pa.string()),
        pa.field(ATTEMPTS, pa.int32()),
        pa.field("id", pa.string()),
        pa.field("tags", pa.string()),  # JSON of CaptionRequest.tags
        # RGB, 8 bits each, row by row; null if the picture is refused. A JPEG would have a tenth of the size, but would
        # take time of the engine's machine to decode, and the model would see its artefacts.
        pa.field("pixels", pa.binary()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("refused", pa.string()),  # the reason; null if there are pixels
    ]
)
_CAPTIONED: Final = pa.schema(
    [
        *(_DECODED.field(name) for name in (SHARD, ROW, MADE_FROM)),
        pa.field(REPORT, pa.string()),
        *(column.with_nullable(True) for column in CAPTIONS),
    ]
)


@dataclass(frozen=True, kw_only=True)
class CaptionShard(ImageShard):
    """A shard whose captions are made by a model."""

    made_from: str  # JSON of the provenance
    finished: bool = False  # captions/<shard> exists, and only rejected rows are asked again
    attempts: Mapping[int, int] = field(default_factory=dict)  # of the finished shard, by row; only those above 0


def read_pictures(shard: CaptionShard, wanted: NDArray[np.int32], dataset: str) -> Iterator[pa.Table]:
    """Rows of an image shard with ids, tags as of posts/<shard>, and pictures."""
    store = Store(dataset)
    tags = read_images(store, shard.shard, TAG_COLUMNS).select(TAG_COLUMNS)
    with open_parquet(store.path(f"images/{shard.shard}.parquet")) as parquet:
        for number, batch in read_rows(parquet, wanted, ["image"]):
            table = tags.take(pa.array(number)).append_column("image", batch["image"])
            table = with_constants(table, {MADE_FROM: shard.made_from})
            attempts = [shard.attempts.get(row, 0) for row in number.tolist()]
            table = table.append_column(ATTEMPTS, pa.array(attempts, pa.int32()))
            yield table.append_column(ROW, pa.array(number, pa.int32()))


def decode_rows(table: pa.Table, max_side: int, most: int = 0) -> Iterator[pa.Table]:
    """Rows of `read_pictures` as _DECODED: with the picture that the model sees, or the reason for refusing it, such as
    that it needs more than `most` bytes; 0 sets no limit."""
    reader = TagReader()
    with memory_limit(most):
        rows = [_decoded(row, reader, max_side) for row in table.to_pylist()]
    yield pa.Table.from_pylist(rows, _DECODED)


def _decoded(row: dict[str, Any], reader: TagReader, max_side: int) -> dict[str, Any]:
    decoded = {name: row[name] for name in (SHARD, ROW, MADE_FROM, ATTEMPTS, "id")}
    decoded["tags"] = json.dumps(request_from_row(row, reader).tags)
    picture = RejectReason.DECODER_DIED.value if row[DIED] else prepare(row["image"], max_side)
    if isinstance(picture, str):
        return decoded | {"refused": picture}
    return decoded | {"pixels": picture.tobytes(), "width": picture.width, "height": picture.height}


def prepare(data: bytes, max_side: int) -> Image.Image | str:
    """The picture for the engine, or the reason for refusing it. RGB, the longer side at most `max_side` pixels, each
    side at least a patch."""
    picture = decode(data)
    if isinstance(picture, Refused):
        return picture.reason.value
    image = picture.image
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(_MIN_SIDE, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


class CaptionRows:
    """The state of an actor. Called for several tables at a time, each in its own thread, it captions their rows with
    one engine."""

    def __init__(self, task: CaptionTask) -> None:
        self._settings = task.settings
        self._captioner = Captioner(task)
        self._worker = uuid.uuid4().hex

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Rows of `decode_rows` as _CAPTIONED, in their order, with a report in the first one."""
        outcomes = self._captioner.caption([_pending(row) for row in table.to_pylist()])
        captions = pa.Table.from_pylist([caption_row(outcome, self._settings) for outcome in outcomes], CAPTIONS)
        counts = RowCounts.of(outcomes, table[ATTEMPTS].to_pylist())
        reports = [report(self._worker, counts, self._captioner.times()), *[None] * (len(outcomes) - 1)]
        columns = {name: table[name] for name in (SHARD, ROW, MADE_FROM)} | {REPORT: pa.array(reports, pa.string())}
        yield pa.table({**columns, **{name: captions[name] for name in CAPTIONS.names}}, _CAPTIONED)


def _pending(row: dict[str, Any]) -> PendingRow:
    picture: Image.Image | str = row["refused"]
    if row["pixels"] is not None:
        picture = Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"])
    return PendingRow(CaptionRequest(row["id"], json.loads(row["tags"])), picture, row[ATTEMPTS])


def write_rows(table: pa.Table, dataset: str, folder: str) -> Iterator[pa.Table]:
    """Writes rows of CaptionRows into partial files of their shards."""
    for shard in pc.unique(table[SHARD]).to_pylist():
        rows = table.filter(pc.equal(table[SHARD], shard))
        partial_files = PartialShard(Store(dataset), folder, shard, rows[MADE_FROM][0].as_py())
        partial_files.write(KIND, rows[ROW].to_numpy(), rows.select(CAPTIONS.names).cast(CAPTIONS))
    yield table.select([SHARD, ROW, REPORT])
