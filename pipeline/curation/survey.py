"""The borders between quality words of a dataset: kept with the selection, else computed from all posts."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Final

import pyarrow as pa

from pipeline.core.errors import UsageError
from pipeline.curation.execution import Execution, InThisProcess
from pipeline.curation.plan import CurationInputs
from pipeline.curation.quality import POST_COLUMNS, PRESETS, QualityTable, posts_of
from pipeline.storage.posts import read_images
from pipeline.storage.shards import Store

BYTES_PER_ROW: Final = 50  # estimated from the columns that are read

# Borders are kept until the dataset has grown or shrunk by more than this share.
_BORDERS_KEPT = 0.1
_READERS = 4


def quality_table(
    dataset: Store,
    folder: str,
    inputs: CurationInputs,
    preset: str,
    renew: bool,
    execution: Execution | None = None,
) -> tuple[QualityTable, str]:
    """The borders between quality words, and the content of the file quality.json that keeps them.

    Borders that are not saved are computed from the posts of the whole dataset, in a task of `execution`, by default
    in this process.

    The saved borders are used again, so that new shards do not change the words of old ones. They are recomputed if
    `renew` is set, for another preset or a new source, and if the dataset has changed in size by more than a tenth.
    Raises UsageError if the saved file is damaged, because recomputing would silently change words.
    """
    file = f"{folder}/quality.json"
    described_preset = {"name": preset, **json.loads(json.dumps(asdict(PRESETS[preset])))}
    if not renew and dataset.exists(file):
        try:
            saved = dataset.read(file).decode()
            record = json.loads(saved)
            table, rows = QualityTable.from_json(saved), float(record["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{dataset.path(file)} is damaged ({type(error).__name__}: {error}); restore it, or recompute the "
                "borders with --new-quality"
            ) from error
        sources = frozenset[str]().union(*(footer.sources for footer in inputs.images.values()))
        if (
            record.get("preset") == described_preset
            and abs(inputs.rows - rows) <= _BORDERS_KEPT * rows
            and sources <= {source for source, _, _ in table.borders}
        ):
            return table, saved
    work = partial(survey, dataset.root, sorted(inputs.images), preset)
    table = (execution or InThisProcess()).task(work, BYTES_PER_ROW * inputs.rows, "computing the quality borders")
    record = {"preset": described_preset, "rows": inputs.rows} | json.loads(table.to_json())
    return table, json.dumps(record, indent=1)


def survey(dataset: str, shards: list[str], preset: str) -> QualityTable:
    """The borders of a preset between the posts of these shards. Needs BYTES_PER_ROW."""
    store = Store(dataset)
    with ThreadPoolExecutor(_READERS) as readers:
        posts = pa.concat_tables(readers.map(lambda shard: posts_of(read_images(store, shard, POST_COLUMNS)), shards))
    return QualityTable.compute(PRESETS[preset], posts)
