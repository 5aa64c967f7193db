"""JOB: images and captions -> the selection of one training stage."""

import hashlib
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial

from pipeline.jobs import Parser, ShardsFailed, UsageError, default_dataset, run, write_run_record
from pipeline.shards import Store


@dataclass(frozen=True, kw_only=True)
class CurateJob:
    dataset: str
    stage: str


def parse_args() -> CurateJob:
    parser = Parser(prog="curate.py", description=__doc__)
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    parser.add_argument(
        "--stage", default="demo", choices=("demo", "256", "512", "768", "1024"),
        help="whose rules apply; default: demo, the one that can be trained so far",
    )  # fmt: skip
    return CurateJob(**vars(parser.parse_args()))


def main() -> None:
    job = parse_args()
    started = time.time()
    from pipeline.cluster import cluster  # takes seconds to import: not for --help
    from pipeline.dataflow import map_shards
    from pipeline.selection import RULES, select_shard, survey

    dataset, folder, rules = Store(job.dataset), f"selections/{job.stage}", RULES[job.stage]
    shards = captioned_shards(dataset)
    # Gone until all is done: a selection with this file is whole.
    dataset.remove(f"{folder}/selection.json")
    quality, plan = survey(dataset.root, shards, rules.preset)
    dataset.write(f"{folder}/quality.json", quality.to_json().encode())
    with cluster("curate"):
        work = partial(select_shard, dataset=dataset.root, name=job.stage, rules=rules, quality=quality)
        failed = map_shards({part.shard: part for part in plan}, work, lambda part: len(part.copies), "curate")

    files = {shard: f"{folder}/{shard}.parquet" for shard in shards if shard not in failed}
    kept = {shard: dataset.rows(file) for shard, file in files.items()}
    reasons = sum((dataset.tally(f"{folder}/rejected/{shard}.parquet", "reason") for shard in files), Counter[str]())
    rows, selected = sum(len(part.copies) for part in plan if part.shard in files), sum(kept.values())
    write_run_record(dataset.path(folder), "curate", started, rows, selected, reasons, stage=job.stage, failed=failed)
    if failed:
        raise ShardsFailed(failed)
    if not selected:
        raise UsageError(
            f"no row is left for stage {job.stage}: {dict(reasons)}; loosen RULES in pipeline/selection.py"
        )
    record = {
        "rules": asdict(rules),
        "selected": selected,
        "rejected": dict(reasons),
        "shards": {shard: count for shard, count in kept.items() if count},
        "hash": digest({shard: dataset.metadata(file)["digest"] for shard, file in files.items()}),
    }
    dataset.write(f"{folder}/selection.json", json.dumps(record, indent=1).encode())


def captioned_shards(dataset: Store) -> list[str]:
    """The shards of the dataset; UsageError unless there are some and all have captions."""
    shards = dataset.shards("images")
    if not shards:
        raise UsageError(
            f"{dataset.root} has no images; run: python pipeline/ingest.py --raw PATH --dataset {dataset.root}"
        )
    if not any(dataset.rows(f"images/{shard}.parquet") for shard in shards):
        reasons = sum((dataset.tally(f"rejected/{shard}.parquet", "reason") for shard in shards), Counter[str]())
        raise UsageError(f"{dataset.root} has no pictures: ingest refused {dict(reasons)}; look into its rejected/")
    missing = sorted(set(shards) - set(dataset.shards("captions")))
    if missing:
        mend = f"run: python pipeline/caption.py --dataset {dataset.root}"
        raise UsageError(f"{len(missing)} of {len(shards)} shards have no captions, first {missing[0]}; {mend}")
    return shards


def digest(parts: dict[str, str]) -> str:
    """One hash for a selection: of its shards' names and contents, whatever the order they were written in."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    run(main)
