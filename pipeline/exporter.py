"""JOB: serves Prometheus metrics about a dataset: rows in each state, shards, bytes, age of the newest shard.

Runs until it is stopped. Each scan lists the dataset and reads the footer or the reasons of new shards only.
"""

import time
from dataclasses import dataclass

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_dataset, run
from pipeline.reporting.dataset_metrics import DatasetMetrics
from pipeline.storage.shards import Store


@dataclass(frozen=True, kw_only=True)
class ExporterJob:
    dataset: str
    host: str
    port: int
    every: float  # seconds
    wait: bool


def parse_args() -> ExporterJob:
    parser = Parser(prog="exporter.py", description=__doc__)
    parser.add_argument(
        "--dataset", default=default_dataset(), metavar="ROOT",
        help="folder or s3:// prefix of the dataset; default: $HDM_DATASET, then ./dataset",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=9405, metavar="N", help="0: any free port; default: 9405")
    parser.add_argument(
        "--every", type=float, default=60, metavar="SECONDS", help="time between two scans; default: 60"
    )
    parser.add_argument("--wait", action="store_true", help="start even if there is no dataset yet")
    job = ExporterJob(**vars(parser.parse_args()))
    if not 0 <= job.port < 65536 or job.every < 1:
        raise UsageError(f"--port is 0 to 65535, --every 1 or more: got {job.port} and {job.every:g}")
    return job


def main() -> None:
    job = parse_args()
    dataset = Store(job.dataset)
    if not (job.wait or dataset.exists("dataset.json")):
        raise UsageError(f"{dataset.root} has no dataset.json: run pipeline/ingest.py first, or give --wait")
    metrics = DatasetMetrics(dataset)
    try:
        port = metrics.serve(job.host, job.port)
    except OSError as error:
        raise UsageError(f"cannot listen on {job.host}:{job.port} ({error}); give another --host or --port") from error
    print(f"exporter: {dataset.root} at http://{job.host}:{port}/metrics, scanned every {job.every:g} s", flush=True)
    while True:
        metrics.scan()
        time.sleep(job.every)


if __name__ == "__main__":
    run(main)
