"""The content of a dataset as Prometheus metrics: rows in each state, shards, bytes, age of the newest shard."""

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pipeline.core.errors import S3Refused, S3Unavailable
from pipeline.reporting.inventory import Holding, Inventory
from pipeline.storage.shards import Store

# Name without hdm_dataset_, help text, names of the labels, and the numbers by a tuple of the labels' values.
Metric = tuple[str, str, tuple[str, ...], Mapping[Any, float]]


class DatasetMetrics(Collector):
    """Metrics of the last scan; none before the first scan. Ages are as of the time of the scrape."""

    def __init__(self, dataset: Store) -> None:
        self._dataset, self._inventory = dataset, Inventory(dataset)
        self._problem = ""
        self._scanned = (0.0, 0.0)  # Unix times of the start and the end of the last scan
        self._holdings: dict[str, Holding] | None = None  # by folder; None if there is no dataset
        self._disk: dict[str, float] = {}  # bytes of the disk that the dataset is on

    def serve(self, host: str, port: int) -> int:
        """Serves /metrics in a thread and returns the port. Raises OSError if the address cannot be used."""
        registry = CollectorRegistry()
        registry.register(self)
        server, _ = start_http_server(port, host, registry)
        return int(server.server_port)

    def scan(self) -> None:
        """Scans the dataset. A problem is printed once to stderr and sets the metric `up` to 0."""
        started, holdings, disk, problem = time.time(), None, {}, ""
        try:
            holdings = self._inventory.scan()
            if holdings is None:
                problem = f"{self._dataset.root} has no dataset.json"
            elif not self._dataset.is_remote:
                usage = shutil.disk_usage(self._dataset.root)
                disk = {"disk_bytes": float(usage.total), "disk_free_bytes": float(usage.free)}
        except (OSError, S3Refused, S3Unavailable) as error:
            problem = str(error)
        if problem != self._problem:
            print(f"exporter: {problem or 'the dataset is there'}", file=sys.stderr, flush=True)
        self._problem, self._holdings, self._disk = problem, holdings, disk
        self._scanned = started, time.time()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, meaning, labels, numbers in self._metrics(time.time()):
            family = GaugeMetricFamily(f"hdm_dataset_{name}", meaning, labels=labels)
            for values, number in numbers.items():
                family.add_metric(values, number)
            yield family

    def _metrics(self, now: float) -> Iterator[Metric]:
        started, ended = self._scanned
        if not ended:
            return
        yield "up", "1 if the dataset could be scanned, else 0", (), {(): self._holdings is not None}
        yield "look_seconds", "Duration of the last scan", (), {(): ended - started}
        yield "look_age_seconds", "Time since the last scan", (), {(): now - ended}
        if self._holdings is not None:
            yield from _rows(self._holdings)
            yield from _files(self._holdings, now)
            for name, size in self._disk.items():
                yield name, "Size or free space of the disk that the dataset is on", (), {(): size}


def _rows(holdings: Mapping[str, Holding]) -> Iterator[Metric]:
    def below(first: str) -> list[tuple[str, Holding]]:
        return [(folder, held) for folder, held in sorted(holdings.items()) if folder.partition("/")[0] == first]

    none, by_folder, captions = Holding(), ("folder",), below("captions")
    yield "ingested_rows", "Rows with an image in the dataset", (), {(): holdings.get("images", none).rows}
    reasons = holdings.get("rejected", none).reasons
    yield "rejected_rows", "Rows refused by ingest", ("reason",), {(why,): rows for why, rows in reasons.items()}
    captioned = {(folder,): held.rows - held.reasons.total() for folder, held in captions}
    yield "captioned_rows", "Rows captioned by the requested engine", by_folder, captioned
    refused = {(folder, why): rows for folder, held in captions for why, rows in held.reasons.items()}
    meaning = "Rows without a caption of the requested engine, by reason"
    yield "caption_rejected_rows", meaning, ("folder", "reason"), refused
    scored = {(folder,): held.rows for folder, held in below("scores")}
    yield "scored_rows", "Rows scored by a classifier", by_folder, scored
    selected = {(folder,): held.rows for folder, held in below("selections")}
    yield "selected_rows", "Rows of a selection", by_folder, selected


def _files(holdings: Mapping[str, Holding], now: float) -> Iterator[Metric]:
    folders, labels = [((folder,), held) for folder, held in holdings.items()], ("folder",)
    yield "shards", "Finished shards", labels, {folder: held.shards for folder, held in folders}
    yield "unreadable_shards", "Shards that cannot be read", labels, {folder: h.unreadable for folder, h in folders}
    yield "bytes", "Size of all files in a folder and below", labels, {folder: held.bytes for folder, held in folders}
    ages = {folder: now - held.newest for folder, held in folders if held.newest is not None}
    yield "newest_shard_age_seconds", "Time since the last shard of a folder was written", labels, ages
