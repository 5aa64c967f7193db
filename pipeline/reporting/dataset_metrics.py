"""The content of a dataset as Prometheus metrics: rows in each state, shards, bytes, age of the newest shard."""

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pipeline.core.errors import S3Refused, S3Unavailable
from pipeline.reporting.inventory import Holding, Inventory
from pipeline.storage.shards import Store


@dataclass(frozen=True)
class Scan:
    """The result of the last scan."""

    holdings: dict[str, Holding] | None  # by folder; None if there is no dataset or it cannot be listed
    disk: dict[str, float]  # bytes of the disk that the dataset is on; {} on S3
    seconds: float  # taken by the scan
    ended: float  # Unix time


class DatasetMetrics(Collector):
    """Metrics of the last scan; none before the first scan. Ages are as of the time of the scrape."""

    def __init__(self, dataset: Store) -> None:
        self._dataset, self._inventory = dataset, Inventory(dataset)
        self._last: Scan | None = None
        self._problem = ""

    def serve(self, host: str, port: int) -> int:
        """Serves /metrics in a thread and returns the port. Raises OSError if the address cannot be used."""
        registry = CollectorRegistry()
        registry.register(self)
        server, _ = start_http_server(port, host, registry)
        return int(server.server_port)

    def scan(self) -> None:
        """Scans the dataset. A problem is printed once to stderr and sets the metric `up` to 0."""
        started = time.time()
        holdings, disk, problem = None, {}, ""
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
        self._problem = problem
        ended = time.time()
        self._last = Scan(holdings, disk, ended - started, ended)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if self._last is None:
            return
        now, last = time.time(), self._last
        yield _gauge("up", "1 if the dataset could be scanned, else 0", last.holdings is not None)
        yield _gauge("look_seconds", "Duration of the last scan", last.seconds)
        yield _gauge("look_age_seconds", "Time since the last scan", now - last.ended)
        if last.holdings is not None:
            yield from _rows(last.holdings)
            yield from _files(last.holdings, now)
            for name, size in last.disk.items():
                yield _gauge(name, "Size or free space of the disk that the dataset is on", size)


def _rows(holdings: Mapping[str, Holding]) -> Iterator[GaugeMetricFamily]:
    def below(first: str) -> dict[str, Holding]:
        return {folder: held for folder, held in sorted(holdings.items()) if folder.partition("/")[0] == first}

    yield _gauge("ingested_rows", "Rows with an image in the dataset", holdings.get("images", Holding()).rows)
    reasons = holdings.get("rejected", Holding()).reasons
    yield _gauges("rejected_rows", "Rows refused by ingest", ("reason",), {(why,): n for why, n in reasons.items()})
    captions = below("captions")
    captioned = {folder: held.rows - held.reasons.total() for folder, held in captions.items()}
    yield _by_folder("captioned_rows", "Rows captioned by the requested engine", captioned)
    meaning = "Rows captioned by their tags because the requested engine failed"
    refused = {(folder, why): rows for folder, held in captions.items() for why, rows in held.reasons.items()}
    yield _gauges("caption_rejected_rows", meaning, ("folder", "reason"), refused)
    scored, selected = below("scores"), below("selections")
    yield _by_folder("scored_rows", "Rows scored by a classifier", {f: held.rows for f, held in scored.items()})
    yield _by_folder("selected_rows", "Rows of a selection", {f: held.rows for f, held in selected.items()})


def _files(holdings: Mapping[str, Holding], now: float) -> Iterator[GaugeMetricFamily]:
    held = holdings.items()
    yield _by_folder("shards", "Finished shards", {folder: of.shards for folder, of in held})
    yield _by_folder("unreadable_shards", "Shards that cannot be read", {folder: of.unreadable for folder, of in held})
    yield _by_folder("bytes", "Size of all files in a folder and below", {folder: of.bytes for folder, of in held})
    ages = {folder: now - of.newest for folder, of in held if of.newest is not None}
    yield _by_folder("newest_shard_age_seconds", "Time since the last shard of a folder was written", ages)


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return _gauges(name, meaning, (), {(): value})


def _by_folder(name: str, meaning: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    return _gauges(name, meaning, ("folder",), {(folder,): value for folder, value in values.items()})


def _gauges(name: str, meaning: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> GaugeMetricFamily:
    """A metric with labels; `values` are by the values of the labels."""
    family = GaugeMetricFamily(f"hdm_dataset_{name}", meaning, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family
