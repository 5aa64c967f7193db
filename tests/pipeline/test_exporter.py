"""The exporter's metrics equal the content of the dataset, also while it changes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow as pa
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from pipeline.core.records import CAPTIONS, REJECTED
from pipeline.reporting.dataset_metrics import DatasetMetrics
from pipeline.storage.shards import Store

ROOT = Path(__file__).parents[2]
RunJob = Callable[..., CompletedProcess[str]]
Metrics = dict[tuple[str, tuple[str, ...]], float]  # by name without hdm_dataset_, and values of the labels

IDS = pa.schema([pa.field("id", pa.string())])


def write_ids(store: Store, name: str, rows: int) -> None:
    store.write_table(name, pa.table({"id": [str(row) for row in range(rows)]}, IDS), IDS)


def write_rejected(store: Store, name: str, reasons: list[str]) -> None:
    rows = [{"key": str(n), "reason": reason, "detail": "", "sha256": None} for n, reason in enumerate(reasons)]
    store.write_table(name, pa.Table.from_pylist(rows, REJECTED), REJECTED)


def write_captions(store: Store, name: str, reasons: list[str | None]) -> None:
    same = {"caption": "a star", "engine": "tags", "model": "none", "prompt_version": "1"}
    rows = [{"id": str(n), "reason": reason, **same} for n, reason in enumerate(reasons)]
    store.write_table(name, pa.Table.from_pylist(rows, CAPTIONS), CAPTIONS)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Two shards of images. One of them is captioned by two engines, scored and selected."""
    place = tmp_path if request.param == "local" else f"{request.getfixturevalue('bucket')}/exporter-{tmp_path.name}"
    store = Store(f"{place}/dataset")
    store.write("dataset.json", b"{}")
    write_ids(store, "images/a.parquet", 5)
    write_ids(store, "images/b.parquet", 3)
    write_ids(store, "images-512/a.parquet", 5)
    write_rejected(store, "rejected/a.parquet", ["not decodable", "video", "video"])
    write_rejected(store, "rejected/b.parquet", ["video"])
    write_captions(store, "captions/a.parquet", [None, None, "refusal", None, "refusal"])
    write_captions(store, "captions/partial/b/0.parquet", [None])
    write_captions(store, "captions/pixtral/a.parquet", [None] * 4 + ["truncated"])
    write_ids(store, "scores/waifu/a.parquet", 5)
    write_rejected(store, "scores/waifu/rejected/a.parquet", ["not decodable"])
    write_ids(store, "selections/demo/a.parquet", 2)
    write_ids(store, "selections/demo/judged/a.parquet", 5)
    store.write("selections/demo/selection.json", b"{}")
    return store


def read(metrics: DatasetMetrics) -> Metrics:
    registry = CollectorRegistry()
    registry.register(metrics)
    return {
        (sample.name.removeprefix("hdm_dataset_"), tuple(sample.labels.values())): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def of(found: Metrics, name: str) -> dict[Any, float]:
    """The values of a metric by its label, or by a tuple of labels."""
    return {labels[0] if len(labels) == 1 else labels: value for (at, labels), value in found.items() if at == name}


def test_rows_are_counted_in_finished_shards(store: Store) -> None:
    metrics = DatasetMetrics(store)
    assert read(metrics) == {}, "no metrics before the first scan"
    metrics.scan()
    found = read(metrics)
    assert of(found, "up") == {(): 1}
    assert of(found, "ingested_rows") == {(): 8}
    assert of(found, "rejected_rows") == {"video": 3, "not decodable": 1}
    assert of(found, "captioned_rows") == {"captions": 3, "captions/pixtral": 4}
    assert of(found, "caption_rejected_rows") == {("captions", "refusal"): 2, ("captions/pixtral", "truncated"): 1}
    assert of(found, "scored_rows") == {"scores/waifu": 5}
    assert of(found, "selected_rows") == {"selections/demo": 2}
    assert of(found, "shards") == {
        "images": 2, "images-512": 1, "rejected": 2, "captions": 1, "captions/pixtral": 1, "scores/waifu": 1,
        "selections/demo": 1,
    }  # fmt: skip
    assert set(of(found, "unreadable_shards").values()) == {0}
    assert sum(of(found, "bytes").values()) == sum(store.sizes().values()) - len(b"{}"), "all but dataset.json"


def test_a_second_scan_reads_only_new_and_changed_shards(
    store: Store, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = DatasetMetrics(store)
    metrics.scan()
    opened: set[str] = set()

    def recorded(really: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Store, name: str = "", *size: int) -> Any:
            opened.add(self.path(name))
            return really(self, name, *size)

        return read

    for method in ("open", "tail"):
        monkeypatch.setattr(Store, method, recorded(getattr(Store, method)))
    metrics.scan()
    assert opened == set()
    if store.is_remote:
        with request.getfixturevalue("s3_server").counting() as requests:
            metrics.scan()
        assert len(requests) == 1, "the listing"
    write_ids(store, "images/c.parquet", 7)
    write_rejected(store, "rejected/b.parquet", [])
    metrics.scan()
    assert opened == {store.path("images/c.parquet"), store.path("rejected/b.parquet")}
    found = read(metrics)
    assert of(found, "ingested_rows") == {(): 15}
    assert of(found, "rejected_rows") == {"video": 2, "not decodable": 1}


def test_a_damaged_shard_is_counted_and_read_once_it_is_repaired(store: Store) -> None:
    store.write("images/b.parquet", b"damaged")
    metrics = DatasetMetrics(store)
    metrics.scan()
    assert of(read(metrics), "ingested_rows") == {(): 5}
    assert of(read(metrics), "unreadable_shards")["images"] == 1
    write_ids(store, "images/b.parquet", 3)
    metrics.scan()
    assert of(read(metrics), "ingested_rows") == {(): 8}
    assert of(read(metrics), "unreadable_shards")["images"] == 0


def test_ages_are_of_the_newest_shard_and_as_of_the_scrape(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("dataset.json", b"{}")
    now = time.time()
    for name, age in (("a", 500), ("b", 300)):
        write_ids(store, f"images/{name}.parquet", 1)
        os.utime(tmp_path / "images" / f"{name}.parquet", (now - age, now - age))
    store.write("images/run.json", b"{}")  # not a shard
    (tmp_path / "images" / ".c.parquet.0123abcd").write_bytes(bytes(1000))  # unfinished
    metrics = DatasetMetrics(store)
    metrics.scan()
    first = of(read(metrics), "newest_shard_age_seconds")["images"]
    assert 300 <= first < 400
    time.sleep(0.1)
    assert of(read(metrics), "newest_shard_age_seconds")["images"] >= first + 0.1
    assert of(read(metrics), "shards") == {"images": 2}
    assert of(read(metrics), "bytes")["images"] > 1000
    assert of(read(metrics), "disk_free_bytes")[()] <= shutil.disk_usage(tmp_path).total


def test_the_server_survives_the_removal_of_its_dataset(tmp_path: Path) -> None:
    dataset, away = tmp_path / "dataset", tmp_path / "away"
    store = Store(str(dataset))
    command = [sys.executable, "-m", "pipeline.exporter", "--dataset", dataset, "--port", "0", "--every", "1"]
    process = subprocess.Popen(
        [*command, "--wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout
        url = process.stdout.readline().partition(" at ")[2].partition(",")[0]
        assert url.startswith("http://127.0.0.1:")
        assert wait_for(url, up=0) == {"hdm_dataset_up"}, "there is no dataset"
        store.write("dataset.json", b"{}")
        write_ids(store, "images/a.parquet", 5)
        assert "hdm_dataset_ingested_rows" in wait_for(url, up=1)
        dataset.rename(away)
        assert wait_for(url, up=0) == {"hdm_dataset_up"}
        away.rename(dataset)
        assert "hdm_dataset_ingested_rows" in wait_for(url, up=1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait(timeout=30)
    assert errors.splitlines() == [
        f"exporter: {dataset} has no dataset.json",
        "exporter: the dataset is there",
        f"exporter: {dataset} has no dataset.json",
        "exporter: the dataset is there",
        "stopped; run the same command to go on",
    ]
    assert process.returncode == 130


def wait_for(url: str, up: float) -> set[str]:
    """Names of the metrics once `up` has this value, apart from the two about the scan itself."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with urllib.request.urlopen(url, timeout=10) as answer:
            samples = [s for f in text_string_to_metric_families(answer.read().decode()) for s in f.samples]
        if any(sample.name == "hdm_dataset_up" and sample.value == up for sample in samples):
            return {sample.name for sample in samples if "_look_" not in sample.name}
        time.sleep(0.2)
    raise TimeoutError(url)


def test_invalid_commands_are_refused_in_one_line(call_job: RunJob, tmp_path: Path, bucket: str) -> None:
    for place in (f"{tmp_path}/nowhere", f"{bucket}/nowhere"):
        refused = call_job("pipeline/exporter.py", "--dataset", place, "--port", "0")
        assert refused.returncode == 2
        assert refused.stderr.splitlines() == [
            f"error: {place} has no dataset.json: run pipeline/ingest.py first, or give --wait"
        ]
    (tmp_path / "dataset.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = call_job("pipeline/exporter.py", "--dataset", tmp_path, "--port", taken.getsockname()[1])
    assert refused.returncode == 2
    assert "Address already in use); give another --host or --port" in refused.stderr
    refused = call_job("pipeline/exporter.py", "--dataset", tmp_path, "--every", "0")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --port is 0 to 65535, --every 1 or more")
