"""Rows of images -> pixels of the classifier's size -> scores. Runs in Ray's processes but does not import Ray.

Axes: N images, L labels, H rows, W columns, C channels.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.tables import DIED, ROW, SHARD, TABLE_BYTES, with_constants
from pipeline.pictures.classifiers import Classifier, digest, load_classifier
from pipeline.pictures.containers import RejectReason
from pipeline.pictures.decoder import DEFAULT_LIMITS, Refused, decode
from pipeline.pictures.memory_limit import PIXEL_BYTES, decoding_memory, memory_limit
from pipeline.pictures.preprocessing import Preprocessing
from pipeline.storage.fingerprints import Provenance
from pipeline.storage.manifest import Footer
from pipeline.storage.row_reader import open_parquet, read_rows
from pipeline.storage.shards import Store

SCORER_VERSION = "1"  # raise it with every change of this code that changes a score
MADE_FROM: Final = "hdm_made_from"  # ScoreShard.made_from, in every row

_PROCESS_BYTES: Final = 300 << 20

_WHICH: Final = (
    pa.field(SHARD, pa.string()),
    pa.field(ROW, pa.int32()),
    pa.field(MADE_FROM, pa.string()),
    pa.field("id", pa.string()),
    pa.field("sha256", pa.string()),
    pa.field("reason", pa.string()),  # for having no scores, as `detail`; null if there are some
    pa.field("detail", pa.string()),
)
PREPARED: Final = pa.schema([*_WHICH, pa.field("pixels", pa.binary())])  # uint8 (H, W, C); null with a reason
SCORED: Final = pa.schema([*_WHICH, pa.field("scores", pa.list_(pa.float32()))])  # (L); null with a reason


@dataclass(frozen=True)
class ScoreShard:
    shard: str
    rows: int
    provenance: Provenance
    largest_group: int  # bytes of the largest row group of the images

    @property
    def made_from(self) -> str:
        return json.dumps(self.provenance, sort_keys=True)


def plan_scores(images: Mapping[str, Footer], model: str, preprocessing: str) -> dict[str, ScoreShard]:
    """The provenance that the scores of each image shard should have. `model` is the digest of the model's folder."""
    common = {"model": model, "preprocessing": preprocessing, "scorer_version": SCORER_VERSION}
    return {
        shard: ScoreShard(shard, file.rows, common | {"images": file.digest}, file.largest_group)
        for shard, file in images.items()
    }


def read_memory(planned: ScoreShard) -> int:
    """Bytes that reading images may take: a row group read and unpacked, the table of its rows, the process."""
    return 3 * planned.largest_group + _PROCESS_BYTES


def prepare_memory() -> int:
    """Bytes to reserve for preparing a table of rows: the rows thrice, a picture that is not large, the process."""
    return 3 * TABLE_BYTES + decoding_memory() + _PROCESS_BYTES


def prepare_limit() -> int:
    """Bytes that preparing may take for the largest picture of a dataset."""
    return 3 * TABLE_BYTES + PIXEL_BYTES * DEFAULT_LIMITS.max_pixels + _PROCESS_BYTES


def read_images(planned: ScoreShard, wanted: NDArray[np.int32], dataset: str) -> Iterator[pa.Table]:
    """The wanted rows of a shard of images, a few megabytes at a time: id, image, sha256, ROW and MADE_FROM."""
    with open_parquet(Store(dataset).path(f"images/{planned.shard}.parquet")) as parquet:
        for number, batch in read_rows(parquet, wanted, ["id", "image", "sha256"]):
            table = with_constants(pa.Table.from_batches([batch]), {MADE_FROM: planned.made_from})
            yield table.append_column(ROW, pa.array(number, pa.int32()))


def prepare_rows(table: pa.Table, preprocessing: Preprocessing, most: int = 0) -> Iterator[pa.Table]:
    """The rows of a table from `read_images` as PREPARED. A picture that needs more than `most` bytes has a reason
    instead of pixels, as has one that ended its process; 0 sets no limit."""
    with memory_limit(most):
        prepared = [_prepared(row, preprocessing) for row in table.select(["image", DIED]).to_pylist()]
    table = table.drop_columns(["image", DIED])
    for name in ("reason", "detail", "pixels"):
        column = pa.array([row.get(name) for row in prepared], PREPARED.field(name).type)
        table = table.append_column(name, column)
    yield table.select(PREPARED.names).cast(PREPARED)


def _prepared(row: Mapping[str, Any], preprocessing: Preprocessing) -> dict[str, Any]:
    if row[DIED]:
        why = "its process ended each time (signal or out of memory)"
        return {"reason": RejectReason.DECODER_DIED.value, "detail": why}
    picture = decode(row["image"])
    if isinstance(picture, Refused):
        return {"reason": picture.reason.value, "detail": picture.detail}
    return {"pixels": preprocessing.resized(picture.image).tobytes()}


def loading(
    model: str, model_digest: str, batch_size: int, device: str, threads: int = 1
) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """Loads a classifier and returns the function that makes SCORED of a table of PREPARED.

    `device` is torch's name, "cpu" or "cuda"; `threads` is the number of CPU threads. Raises ValueError if the folder
    `model` has another digest on this machine.
    """
    if digest(Path(model)) != model_digest:
        raise ValueError(f"{model} holds other files on this machine than on the one that started the job")
    classifier = load_classifier(Path(model), device, threads)
    # Which rows meet in a batch differs from run to run. A GPU may compute the last bits of a batch of another size
    # differently, and CPUs those of a single picture.
    least = batch_size if device == "cuda" else min(2, batch_size)

    def classify(table: pa.Table) -> Iterator[pa.Table]:
        for start in range(0, table.num_rows, batch_size):
            yield _scored(table.slice(start, batch_size).combine_chunks(), classifier, least)

    return classify


def _scored(table: pa.Table, classifier: Classifier, least: int) -> pa.Table:
    """A batch of PREPARED as SCORED, computed in a batch of at least `least` pictures."""
    found = pc.is_valid(table["pixels"]).to_numpy()
    scores: list[NDArray[np.float32] | None] = [None] * table.num_rows
    if found.any():
        shape = (*classifier.preprocessing.size, 3)
        pictures = [np.frombuffer(data, np.uint8).reshape(shape) for data in table["pixels"].drop_null().to_pylist()]
        filled = pictures + pictures[-1:] * (least - len(pictures))
        for number, scores_L in zip(np.flatnonzero(found), classifier.scores(np.stack(filled)), strict=False):
            scores[number] = scores_L
    column = pa.array(scores, pa.list_(pa.float32()))
    return table.drop_columns(["pixels"]).append_column("scores", column).cast(SCORED)
