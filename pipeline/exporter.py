"""JOB: what a dataset holds, as metrics for Prometheus: rows in each state, shards, bytes, age of the newest shard.

It looks again and again until it is ended: a listing each time, and of new shards the footer or the column of reasons.
"""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pipeline.core.errors import S3Refused, S3Unavailable, UsageError
from pipeline.core.jobs import Parser, default_dataset, run
from pipeline.reporting.inventory import Holding, Inventory
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
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine's")
    parser.add_argument("--port", type=int, default=9405, metavar="N", help="0: any that is free; default 9405")
    parser.add_argument(
        "--every", type=float, default=60, metavar="SECONDS", help="between two looks at the dataset; default 60"
    )
    parser.add_argument("--wait", action="store_true", help="for a dataset that is not there yet")
    job = ExporterJob(**vars(parser.parse_args()))
    if not 0 <= job.port < 65536 or job.every < 1:
        raise UsageError(f"--port is 0 to 65535, --every 1 or more: got {job.port} and {job.every:g}")
    return job


def main() -> None:
    job = parse_args()
    dataset = Store(job.dataset)
    if not (job.wait or dataset.exists("dataset.json")):
        raise UsageError(f"{dataset.root} has no dataset.json: run pipeline/ingest.py first, or give --wait")
    metrics, registry = DatasetMetrics(dataset), CollectorRegistry()
    registry.register(metrics)
    try:
        server, _ = start_http_server(job.port, job.host, registry)
    except OSError as error:
        raise UsageError(f"cannot listen on {job.host}:{job.port} ({error}); give another --host or --port") from error
    where = f"http://{job.host}:{server.server_port}/metrics"
    print(f"exporter: {dataset.root} at {where}, looked at every {job.every:g} s", flush=True)
    while True:
        metrics.look()
        time.sleep(job.every)


@dataclass(frozen=True)
class Look:
    """What was found, and when."""

    holdings: dict[str, Holding] | None  # by folder; None where there is no dataset
    disk: dict[str, float]  # bytes of the dataset's disk, where it is on one
    seconds: float  # that it took
    ended: float  # seconds, Unix


class DatasetMetrics(Collector):
    """Those of the last look, as of the time of the scrape; none before the first one."""

    def __init__(self, dataset: Store) -> None:
        self._dataset, self._inventory = dataset, Inventory(dataset)
        self._look: Look | None = None
        self._said = ""

    def look(self) -> None:
        """A dataset that cannot be looked at is said once, on stderr, and is down in the metrics."""
        started, why = time.time(), ""
        holdings, disk = None, {}
        try:
            holdings = self._inventory.look()
            disk = {} if holdings is None else _disk(self._dataset)
            why = f"{self._dataset.root} has no dataset.json" if holdings is None else ""
        except (OSError, S3Refused, S3Unavailable) as error:
            why = str(error)
        if why != self._said:
            print(f"exporter: {why or 'the dataset is there'}", file=sys.stderr, flush=True)
        self._said = why
        ended = time.time()
        self._look = Look(holdings, disk, ended - started, ended)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if self._look is None:
            return
        now, look = time.time(), self._look
        yield _gauge("up", "1 where the dataset could be looked at, else 0", look.holdings is not None)
        yield _gauge("look_seconds", "taken by the last look at the dataset", look.seconds)
        yield _gauge("look_age_seconds", "since the last look at the dataset", now - look.ended)
        if look.holdings is not None:
            yield from _rows(look.holdings)
            yield from _files(look.holdings, now)
            for name, size in look.disk.items():
                yield _gauge(name, "of the disk that the dataset is on", size)


def _rows(holdings: Mapping[str, Holding]) -> Iterator[GaugeMetricFamily]:
    def of(first: str) -> dict[str, Holding]:
        return {folder: held for folder, held in sorted(holdings.items()) if folder.partition("/")[0] == first}

    yield _gauge("ingested_rows", "whose image is in the dataset", holdings.get("images", Holding()).rows)
    rejected = holdings.get("rejected", Holding()).reasons
    yield _gauges("rejected_rows", "refused by ingest", ("reason",), (((why,), rows) for why, rows in rejected.items()))
    captions = of("captions")
    captioned = {folder: held.rows - held.reasons.total() for folder, held in captions.items()}
    yield _by_folder("captioned_rows", "with a caption of the engine that was asked", captioned)
    refused = (((folder, why), rows) for folder, held in captions.items() for why, rows in held.reasons.items())
    yield _gauges("caption_rejected_rows", "with their tags' caption instead", ("folder", "reason"), refused)
    yield _by_folder("scored_rows", "with scores of a classifier", {f: held.rows for f, held in of("scores").items()})
    yield _by_folder("selected_rows", "of a selection", {f: held.rows for f, held in of("selections").items()})


def _files(holdings: Mapping[str, Holding], now: float) -> Iterator[GaugeMetricFamily]:
    shards = {folder: held.shards for folder, held in holdings.items()}
    unreadable = {folder: held.unreadable for folder, held in holdings.items()}
    sizes = {folder: held.bytes for folder, held in holdings.items()}
    ages = {folder: now - held.newest for folder, held in holdings.items() if held.newest is not None}
    yield _by_folder("shards", "finished", shards)
    yield _by_folder("unreadable_shards", "that cannot be read", unreadable)
    yield _by_folder("bytes", "of all files in a folder and below", sizes)
    yield _by_folder("newest_shard_age_seconds", "since a folder's last shard was written", ages)


def _disk(dataset: Store) -> dict[str, float]:
    """S3 tells of none."""
    if dataset.is_remote:
        return {}
    disk = shutil.disk_usage(dataset.root)
    return {"disk_bytes": disk.total, "disk_free_bytes": disk.free}


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return _gauges(name, meaning, (), [((), value)])


def _by_folder(name: str, meaning: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    return _gauges(name, meaning, ("folder",), (((folder,), value) for folder, value in values.items()))


def _gauges(
    name: str, meaning: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    """`values`: those of the labels, and the figure."""
    family = GaugeMetricFamily(f"hdm_dataset_{name}", meaning, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


if __name__ == "__main__":
    run(main)
