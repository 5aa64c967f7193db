"""One shard of images -> one shard of scores. Runs in a Ray actor; knows nothing of Ray."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.records import REJECTED, Rejected, scores_schema
from pipeline.pictures.classifiers import Classifier, digest, load_classifier
from pipeline.pictures.decoder import Refused, decode
from pipeline.storage.fingerprints import Footer, MadeFrom
from pipeline.storage.shards import Store

SCORER_VERSION = "1"  # of this code: whatever changes a score must raise it

Prepared = NDArray[np.uint8] | Refused  # pixels (H, W, C) of the model's size, or why there are none


@dataclass(frozen=True)
class ScoreShard:
    shard: str
    rows: int
    made_from: MadeFrom


def plan_scores(images: Mapping[str, Footer], model: str, preprocessing: str) -> dict[str, ScoreShard]:
    """Every shard of images, with what its scores are made from: `model` is a folder's `digest`."""
    common = {"model": model, "preprocessing": preprocessing, "scorer_version": SCORER_VERSION}
    return {
        shard: ScoreShard(shard, footer.rows, common | {"images": footer.digest}) for shard, footer in images.items()
    }


class Scorer:
    """All that an actor holds: the classifier, loaded once, and threads that decode."""

    def __init__(self, *, model: str, model_digest: str, dataset: str, folder: str, batch_size: int, device: str,
                 threads: int) -> None:  # fmt: skip
        if digest(Path(model)) != model_digest:
            raise ValueError(f"{model} holds other files on this machine than on the one that started the job")
        self.classifier = load_classifier(Path(model), device, threads)
        self.store, self.folder, self.batch_size = Store(dataset), folder, batch_size
        self.pool = ThreadPoolExecutor(threads)

    def __call__(self, planned: ScoreShard) -> None:
        score_shard(planned, self.store, self.folder, self.classifier, self.batch_size, self.pool)


def score_shard(
    planned: ScoreShard, store: Store, folder: str, classifier: Classifier, batch_size: int, pool: ThreadPoolExecutor
) -> None:
    """Write <folder>/<shard>, its rows those of images/<shard>, and <folder>/rejected/<shard>: those that could not be
    decoded. The scores are committed last, so that a finished shard has both files.

    Holds one row group of images (64 MB at most), one batch and its successor, and for each thread of `pool` a picture
    at its full size.
    """
    schema = scores_schema(classifier.labels)
    rejected: list[dict[str, Any]] = []
    made_from = json.dumps(planned.made_from, sort_keys=True)
    with (
        store.writing_table(f"{folder}/{planned.shard}.parquet", schema, made_from=made_from) as write,
        store.open(f"images/{planned.shard}.parquet") as file,
    ):
        images = pq.ParquetFile(file)
        for group in range(images.num_row_groups):
            rows = images.read_row_group(group, columns=["id", "image", "sha256"]).to_pylist()
            scores_NL, refused = _score(rows, classifier, batch_size, pool)
            rejected += refused
            columns = [_column(scores_N) for scores_N in scores_NL.T]
            write(pa.Table.from_arrays([pa.array([row["id"] for row in rows], pa.string()), *columns], schema=schema))
        refusals = pa.RecordBatch.from_pylist(rejected, REJECTED)
        store.write_table(f"{folder}/rejected/{planned.shard}.parquet", refusals, REJECTED)


def _score(
    rows: list[dict[str, Any]], classifier: Classifier, batch_size: int, pool: ThreadPoolExecutor
) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
    """(N, L), NaN in the rows that have no scores, and these rows as REJECTED has them."""

    def prepare(data: bytes) -> Prepared:
        picture = decode(data)
        return picture if isinstance(picture, Refused) else classifier.preprocessing.resized(picture.image)

    scores_NL = np.full((len(rows), len(classifier.labels)), np.nan, np.float32)
    refused = []
    at = 0
    for batch in _batches([row["image"] for row in rows], batch_size, prepare, pool):
        good = {at + n: prepared for n, prepared in enumerate(batch) if not isinstance(prepared, Refused)}
        if good:
            scores_NL[list(good)] = classifier.scores(np.stack(list(good.values())))
        for n, prepared in enumerate(batch):
            if isinstance(prepared, Refused):
                row = rows[at + n]
                why = Rejected(row["id"], prepared.reason.value, prepared.detail)
                refused.append(asdict(why) | {"sha256": row["sha256"]})
        at += len(batch)
    return scores_NL, refused


def _batches(
    images: list[bytes], size: int, prepare: Callable[[bytes], Prepared], pool: ThreadPoolExecutor
) -> Iterator[list[Prepared]]:
    """Prepared pictures in order, `size` at a time; the next batch is prepared while one is in use."""
    ahead: deque[list[Future[Prepared]]] = deque()
    for start in range(0, len(images), size):
        ahead.append([pool.submit(prepare, data) for data in images[start : start + size]])
        if len(ahead) == 2:
            yield [future.result() for future in ahead.popleft()]
    for futures in ahead:
        yield [future.result() for future in futures]


def _column(scores_N: NDArray[np.float32]) -> pa.Array:
    return pa.array(scores_N, pa.float32(), from_pandas=True)  # NaN becomes null; no model's score is NaN
