"""Export a selection for other trainers: WebDataset tars, folders of pictures with text files, or Hugging Face parquet.

Finished shards are kept, so an interrupted export continues when it is run again.
"""

import json
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.core.jobs import run
from pipeline.exports.command import ExportJob, parse_args
from pipeline.exports.shards import ExportShard, export_shard, path_of
from pipeline.storage.run_record import write_run_record
from pipeline.storage.shards import Store


def main() -> None:
    job = parse_args(__doc__)
    record = read_selection(Store(job.dataset), job.name)
    check_folder(job, {"hash": record["hash"], "selection": job.name, "to": job.to, "text": job.text})
    export(job, record["shards"])


def read_selection(dataset: Store, name: str) -> dict[str, Any]:
    """The record of a finished selection. Raises UsageError if there is none."""
    file = f"selections/{name}/selection.json"
    if not dataset.exists(file):
        raise UsageError(f"{dataset.path(file)} does not exist; run: python pipeline/curate.py --name {name}")
    record: dict[str, Any] = json.loads(dataset.read(file))
    return record


def check_folder(job: ExportJob, made_from: Mapping[str, str]) -> None:
    """Records what is exported. Raises UsageError if the folder holds something else."""
    file = job.out / "export.json"
    if file.exists() and json.loads(file.read_bytes()) != made_from:
        raise UsageError(f"{job.out} holds an export of another selection, format or text; give another --out")
    if not file.exists() and job.out.is_dir() and any(job.out.iterdir()):
        raise UsageError(f"{job.out} is not empty and holds no export; give another --out")
    job.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made_from))


def export(job: ExportJob, rows: dict[str, int]) -> None:
    started = time.time()
    shards = {name: ExportShard(job.dataset, job.name, name, count) for name, count in rows.items()}
    todo = {name: shard for name, shard in shards.items() if not path_of(job.out, name, job.to).exists()}
    print(f"export: {len(shards)} shards, {len(todo)} to do", flush=True)
    failed: dict[str, str] = {}
    if todo:
        from pipeline.core.cluster import cluster  # Ray takes seconds to import
        from pipeline.core.dataflow import map_shards

        work = partial(export_shard, out=job.out, to=job.to, text=job.text)
        with cluster("export"):
            failed = map_shards(todo, work, lambda shard: shard.rows, "exporting")
    total = sum(shard.rows for name, shard in shards.items() if name not in failed)
    write_run_record(str(job.out), "export", started, total, total, {}, failed=failed)
    if failed:
        raise ShardsFailed(failed)


if __name__ == "__main__":
    run(main)
