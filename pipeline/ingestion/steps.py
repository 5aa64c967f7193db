"""The two row pipelines of an ingest: raw files -> shards, and finished shards -> their smaller tier."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from pipeline.core.row_pipeline import CHECK_CPUS, Pending, Step, at_most_a_node, stream_rows
from pipeline.ingestion.commit import commit_shard, partial_shard, write_rows
from pipeline.ingestion.raw_rows import all_rows, read_memory, read_raw
from pipeline.ingestion.rules import IngestRules, RawShard, tier_folder
from pipeline.ingestion.smaller_tier import commit_tier, downsize_rows, read_images, tier_parts, write_tier_rows
from pipeline.ingestion.validation import check_limit, check_memory, check_rows
from pipeline.storage.shards import Store


def ingest_shards(shards: Mapping[str, RawShard], dataset: Store, rules: IngestRules) -> dict[str, str]:
    """Writes images/, rejected/ and the smaller tier of these shards, by name. Returns the reason for each that
    failed."""
    started = set(dataset.folders("images/partial"))
    todo = {}
    for name, raw in shards.items():
        rows = all_rows(raw)
        if name in started:
            rows = np.setdiff1d(rows, partial_shard(raw, dataset.root, rules).rows("images", "rejected"))
        todo[name] = Pending(shard=raw, rows=rows)
    memory, most = check_memory(rules), at_most_a_node(check_limit(rules))
    return stream_rows(
        "ingest",
        todo,
        partial(read_raw, rules=rules),
        [
            Step(name="check", work=partial(check_rows, rules=rules, most=most), cpus=CHECK_CPUS, memory=memory),
            Step(name="write", work=partial(write_rows, dataset=dataset.root), cpus=CHECK_CPUS, memory=memory),
        ],
        partial(commit_shard, dataset=dataset.root, rules=rules),
        read_memory=max(map(read_memory, shards.values())),
    )


def downsize_shards(shards: Mapping[str, RawShard], dataset: Store, rules: IngestRules) -> dict[str, str]:
    """Writes the smaller tier of these shards, whose images are finished. Returns the reason for each that failed."""
    assert rules.downsize
    folder = tier_folder(rules.downsize)
    started = set(dataset.folders(f"{folder}/partial"))
    todo = {}
    for name, raw in shards.items():
        rows = np.arange(dataset.rows(f"images/{name}.parquet"), dtype=np.int32)
        if name in started:
            rows = np.setdiff1d(rows, tier_parts(raw, dataset.root, rules).rows("tier"))
        todo[name] = Pending(shard=raw, rows=rows)
    memory = check_memory(rules)
    return stream_rows(
        "ingest",
        todo,
        partial(read_images, dataset=dataset.root, rules=rules),
        [
            Step(name="downsize", work=partial(downsize_rows, rules=rules), cpus=CHECK_CPUS, memory=memory),
            Step(
                name="write", work=partial(write_tier_rows, dataset=dataset.root, folder=folder), cpus=CHECK_CPUS,
                memory=memory,
            ),
        ],
        partial(commit_tier, dataset=dataset.root, rules=rules),
    )  # fmt: skip
