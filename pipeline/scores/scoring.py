"""One shard of images -> one shard of scores. Runs in a Ray actor but does not import Ray.

Axes: N images, L labels, H rows, W columns, C channels.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.records import REJECTED, Rejected, scores_schema
from pipeline.pictures.classifiers import digest, load_classifier
from pipeline.pictures.decoder import Refused, decode
from pipeline.storage.fingerprints import FileIdentity, Provenance
from pipeline.storage.shards import Store

SCORER_VERSION = "1"  # raise it with every change of this code that changes a score

Prepared = NDArray[np.uint8] | Refused  # pixels (H, W, C) of the model's size, or the reason for having none


@dataclass(frozen=True)
class ScoreShard:
    shard: str
    rows: int
    provenance: Provenance


def plan_scores(images: Mapping[str, FileIdentity], model: str, preprocessing: str) -> dict[str, ScoreShard]:
    """The provenance that the scores of each image shard should have. `model` is the digest of the model's folder."""
    common = {"model": model, "preprocessing": preprocessing, "scorer_version": SCORER_VERSION}
    return {shard: ScoreShard(shard, file.rows, common | {"images": file.digest}) for shard, file in images.items()}


class Scorer:
    """Scores shards with a classifier that is loaded once; `threads` decode images."""

    def __init__(self, *, model: str, model_digest: str, dataset: str, folder: str, batch_size: int, device: str,
                 threads: int) -> None:  # fmt: skip
        if digest(Path(model)) != model_digest:
            raise ValueError(f"{model} holds other files on this machine than on the one that started the job")
        self.classifier = load_classifier(Path(model), device, threads)
        self.store, self.folder, self.batch_size = Store(dataset), folder, batch_size
        self.pool = ThreadPoolExecutor(threads)

    def __call__(self, planned: ScoreShard) -> None:
        """Write <folder>/<shard> with the rows of images/<shard>, and <folder>/rejected/<shard> with undecodable ones.

        The scores are committed last, so that a finished shard has both files. Holds one row group of images (at most
        64 MB), two batches, and one full-size image per thread.
        """
        schema = scores_schema(self.classifier.labels)
        rejected: list[dict[str, Any]] = []
        made_from = json.dumps(planned.provenance, sort_keys=True)
        scores = self.store.writing_table(f"{self.folder}/{planned.shard}.parquet", schema, made_from=made_from)
        with scores as write, self.store.open(f"images/{planned.shard}.parquet") as file:
            images = pq.ParquetFile(file)
            for group in range(images.num_row_groups):
                rows = images.read_row_group(group, columns=["id", "image", "sha256"]).to_pylist()
                scores_NL = self._score(rows, rejected)
                # NaN becomes null; a classifier never outputs NaN.
                columns = [pa.array(scores_N, pa.float32(), from_pandas=True) for scores_N in scores_NL.T]
                ids = pa.array([row["id"] for row in rows], pa.string())
                write(pa.Table.from_arrays([ids, *columns], schema=schema))
            refusals = pa.RecordBatch.from_pylist(rejected, REJECTED)
            self.store.write_table(f"{self.folder}/rejected/{planned.shard}.parquet", refusals, REJECTED)

    def _score(self, rows: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> NDArray[np.float32]:
        """Scores (N, L), NaN for undecodable images, which are appended to `rejected` as rows of REJECTED."""
        scores_NL = np.full((len(rows), len(self.classifier.labels)), np.nan, np.float32)
        start = 0
        for batch in self._batches([row["image"] for row in rows]):
            good = {n: prepared for n, prepared in enumerate(batch, start) if not isinstance(prepared, Refused)}
            if good:
                scores_NL[list(good)] = self.classifier.scores(np.stack(list(good.values())))
            for row, prepared in zip(rows[start:], batch, strict=False):
                if isinstance(prepared, Refused):
                    reason = Rejected(row["id"], prepared.reason.value, prepared.detail)
                    rejected.append(asdict(reason) | {"sha256": row["sha256"]})
            start += len(batch)
        return scores_NL

    def _batches(self, images: list[bytes]) -> Iterator[list[Prepared]]:
        """Prepared images in order. The next batch is prepared while the caller uses one."""
        ahead: deque[list[Future[Prepared]]] = deque()
        for start in range(0, len(images), self.batch_size):
            ahead.append([self.pool.submit(self._prepare, data) for data in images[start : start + self.batch_size]])
            if len(ahead) == 2:
                yield [future.result() for future in ahead.popleft()]
        for futures in ahead:
            yield [future.result() for future in futures]

    def _prepare(self, data: bytes) -> Prepared:
        picture = decode(data)
        return picture if isinstance(picture, Refused) else self.classifier.preprocessing.resized(picture.image)
