"""The two row pipelines of an ingest: raw files -> shards, and finished shards -> their smaller tier."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from pipeline.core.cluster import at_most_a_node, nodes
from pipeline.core.row_pipeline import CHECK_CPUS, Step, stream_rows
from pipeline.core.shard_progress import Pending
from pipeline.ingestion.commit import COMMIT_BYTES, commit_shard, partial_shard, write_rows
from pipeline.ingestion.raw_rows import all_rows, read_memory, read_raw, reading_key
from pipeline.ingestion.rules import IngestRules, RawShard, tier_folder
from pipeline.ingestion.smaller_tier import commit_tier, downsize_rows, read_images, tier_parts, write_tier_rows
from pipeline.ingestion.validation import check_limit, check_memory, check_rows
from pipeline.storage.manifest import Catalog
from pipeline.storage.scan import map_in_order
from pipeline.storage.shards import Store

_LEAST_READS = 2  # shards at a time


def ingest_shards(shards: Mapping[str, RawShard], dataset: Store, rules: IngestRules) -> dict[str, str]:
    """Writes images/, rejected/ and the smaller tier of these shards, by name. Returns the reason for each that
    failed."""
    started = set(dataset.folders("images/partial"))

    def pending(raw: RawShard) -> Pending[RawShard]:
        rows = all_rows(raw)
        if raw.shard in started:
            rows = np.setdiff1d(rows, partial_shard(raw, dataset.root, rules).rows("checked", "rejected"))
        return Pending(shard=raw, rows=rows)

    memory, most = check_memory(rules), at_most_a_node(check_limit(rules))
    reading = max(map(read_memory, shards.values()))
    readings = {reading_key(found): found for found in {raw.reading for raw in shards.values()}}
    return stream_rows(
        "ingest",
        dict(zip(shards, map_in_order(pending, shards.values()), strict=True)),
        partial(read_raw, rules=rules),
        [
            Step(
                name="check",
                work=partial(check_rows, rules=rules, readings=readings, most=most),
                cpus=CHECK_CPUS,
                memory=memory,
            ),
            Step(name="write", work=partial(write_rows, dataset=dataset.root), cpus=CHECK_CPUS, memory=memory),
        ],
        partial(commit_shard, dataset=dataset.root, rules=rules),
        read_memory=reading,
        commit_memory=reading + COMMIT_BYTES,  # which reads the images of the raw file
        most_reads=_most_reads(),
    )


def downsize_shards(shards: Mapping[str, RawShard], dataset: Store, rules: IngestRules) -> dict[str, str]:
    """Writes the smaller tier of these shards, whose images are finished. Returns the reason for each that failed."""
    assert rules.downsize
    folder = tier_folder(rules.downsize)
    started = set(dataset.folders(f"{folder}/partial"))
    images = Catalog(dataset).footers("images", shards)

    def pending(raw: RawShard) -> Pending[RawShard]:
        rows = np.arange(images[raw.shard].rows, dtype=np.int32)
        if raw.shard in started:
            rows = np.setdiff1d(rows, tier_parts(raw, dataset.root, rules).rows("tier"))
        return Pending(shard=raw, rows=rows)

    memory = check_memory(rules)
    write = partial(write_tier_rows, dataset=dataset.root, folder=folder)
    return stream_rows(
        "ingest",
        dict(zip(shards, map_in_order(pending, shards.values()), strict=True)),
        partial(read_images, dataset=dataset.root, rules=rules),
        [
            Step(name="downsize", work=partial(downsize_rows, rules=rules), cpus=CHECK_CPUS, memory=memory),
            Step(name="write", work=write, cpus=CHECK_CPUS, memory=memory),
        ],
        partial(commit_tier, dataset=dataset.root, rules=rules),
        most_reads=_most_reads(),
    )


def _most_reads() -> int:
    """Shards to read at a time: enough for the tasks that check, and few, so that few shards are unfinished."""
    return max(_LEAST_READS, int(sum(node.get("CPU", 0) for node in nodes())) // 2)
