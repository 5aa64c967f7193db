"""Compare every row and the counts of every job of two runs of the demo, for deploy/smoke.sh.

python deploy/smoke_compare.py DATASET RUN DATASET RUN
"""

import json
import sys

import pyarrow.parquet as pq

from pipeline.core.errors import JobFailed
from pipeline.core.jobs import run
from pipeline.storage.shards import Store

_FOLDERS = ("images", "rejected", "captions", "selections/demo")
_COUNTED = ("images", "captions", "selections/demo")


def main() -> None:
    datasets, runs = [Store(root) for root in sys.argv[1::2]], [Store(root) for root in sys.argv[2::2]]
    for folder in _FOLDERS:
        names, others = (dataset.shards(folder) for dataset in datasets)
        if names != others:
            raise JobFailed(f"{folder}: shards in only one dataset: {sorted(set(names) ^ set(others))}")
        rows = 0
        for name in names:
            one, other = (pq.read_table(dataset.open(f"{folder}/{name}.parquet")) for dataset in datasets)
            if not one.equals(other):
                raise JobFailed(f"{folder}/{name}.parquet: different rows ({one.num_rows} and {other.num_rows})")
            rows += one.num_rows
        print(f"smoke: {folder}: {len(names)} shards, {rows} rows in both, every value equal")
    for folder in _COUNTED:
        counts = [record(dataset, folder) for dataset in datasets]
        same(folder, *({key: count[key] for key in ("rows_in", "rows_out", "rejected")} for count in counts))
    ends = [record(folder, "demo") for folder in runs]
    same("training", *({"steps": end["steps"], "samples": end["rows_in"], "loss": end["last"]["loss"]} for end in ends))


def record(store: Store, folder: str) -> dict:
    return json.loads(store.read(f"{folder}/run.json"))


def same(what: str, one: dict, other: dict) -> None:
    if one != other:
        raise JobFailed(f"{what} differs: {one} and {other}")
    print(f"smoke: {what}: {json.dumps(one)} in both")


if __name__ == "__main__":
    run(main)
