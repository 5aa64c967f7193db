"""Prometheus accepts the rules, the dashboards' queries and the metrics of a running cluster."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray.dashboard.modules.metrics.dashboards as rays_dashboards
import yaml
from prometheus_client import CollectorRegistry

from pipeline.captions.stats import CaptionMeter, EngineTimes, RowCounts, report
from pipeline.core.progress import StallDetector
from pipeline.reporting.dataset_metrics import DatasetMetrics
from pipeline.storage.shards import Store
from trainer.training.metrics import GAUGE_PREFIX, METRICS

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(MONITORING.glob("grafana/dashboards/*.json"))}
RULES = [rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
DISCOVERY = "prom_metrics_service_discovery.json"

# Values that Grafana would substitute.
VARIABLES = {"$__rate_interval": "5m", "$stage": ".*"}


def query_of(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


QUERIES = {
    f"{name}: {panel['title']}: {target['refId']}": query_of(target["expr"])
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    for target in panel["targets"]
} | {rule["alert"]: rule["expr"] for rule in RULES}


def promtool(*arguments: object) -> "subprocess.CompletedProcess[str]":
    if not shutil.which("promtool"):
        pytest.skip("no promtool: apt-get install prometheus")
    return subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )


@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", MONITORING / "prometheus.yml"),
        ("check", "rules", MONITORING / "alerts.yml"),
        ("test", "rules", "tests/deploy/alerts_test.yml"),
    ],
    ids=["config", "rules", "what fires when"],
)
def test_promtool_finds_no_fault(check: tuple[object, ...]) -> None:
    done = promtool(*check)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((ROOT / "tests/deploy/alerts_test.yml").read_text())["tests"]
    tested = {test["alertname"] for group in tests for test in group["alert_rule_test"] if test["exp_alerts"]}
    assert {rule["alert"] for rule in RULES} == tested


def test_every_query_of_a_dashboard_is_valid_promql(tmp_path: Path) -> None:
    rules = [{"record": f"query_{n}", "expr": expression} for n, expression in enumerate(QUERIES.values())]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = promtool("check", "rules", tmp_path / "queries.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def metrics_of(expression: str) -> set[str]:
    """Names of the queried series, without labels, functions and keywords."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on|group_left) \([^)]*\)", "", expression)
    return set(re.findall(r"\b(?:ray_|hdm_)\w+|\bup\b", bare))


def test_every_query_uses_metrics_that_jobs_the_exporter_or_ray_export(tmp_path: Path) -> None:
    Store(str(tmp_path)).write("dataset.json", b"{}")
    metrics = DatasetMetrics(Store(str(tmp_path)))
    metrics.scan()
    registry = CollectorRegistry()
    registry.register(metrics)
    meter = CaptionMeter(9, kept=0, dollars_per_hour=1.0)  # when all are done, it has every gauge
    for count in (1, 8):
        meter.add(report("actor", RowCounts(rows=count), EngineTimes()))
    standing = meter.progress(9)
    jobs = "".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py"))
    rows = {task for task in ("ingest", "caption", "judging", "writing", "score") if f'"{task}"' in jobs}
    known = (
        {"up", "ray_hdm_rows_left", "ray_hdm_train_disk_used_share"}
        | {f"ray_{prefix}{name}" for prefix in ("hdm_", GAUGE_PREFIX) for name in StallDetector(0.0).update(0, 0.0)}
        | {family.name for family in registry.collect()}
    )
    known |= {f"ray_{GAUGE_PREFIX}{name}" for name in METRICS} | {f"ray_hdm_{task}_rows_total" for task in rows}
    known |= {f"ray_{name}_total" for name in standing.counts} | {f"ray_{name}" for name in standing.gauges}
    ray = "".join(path.read_text() for path in Path(rays_dashboards.__path__[0]).glob("*.py"))
    known |= {name for name in re.findall(r"ray_\w+", ray) if not name.startswith("ray_hdm_")}
    for place, expression in QUERIES.items():
        assert metrics_of(expression), place
        assert metrics_of(expression) <= known, place


def test_dashboards_need_no_plugin_and_use_the_provisioned_source() -> None:
    [source] = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert sorted(DASHBOARDS) == ["caption", "dataset", "ingest", "train"]
    for name, dashboard in DASHBOARDS.items():
        assert dashboard["uid"] == f"hdm-{name}"
        panels = dashboard["panels"]
        assert {panel["type"] for panel in panels} <= {"stat", "timeseries", "bargauge"}
        assert {(p["datasource"]["type"], p["datasource"]["uid"]) for p in panels} == {(source["type"], source["uid"])}
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken = [
            (x, y)
            for at in (panel["gridPos"] for panel in panels)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        ]
        assert len(set(taken)) == len(taken), f"{name}: panels overlap"
        assert max(x for x, _ in taken) < 24, f"{name}: Grafana has 24 columns"


# --- A cluster, its jobs and Prometheus -------------------------------------------------------------------------------

# A separate Ray: the one of the test session has no dashboard, which writes the list for Prometheus.
HEAD = """
import signal, sys, ray
context = ray.init(address="local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=0,
         log_to_driver=False, _temp_dir=sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # also stops Ray
print(ray.get_runtime_context().gcs_address, context.dashboard_url, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Prometheus:
    url: str

    def get(self, path: str, **arguments: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}", timeout=10) as got:
            return json.load(got)["data"]

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """Values by label values."""
        found = self.get("query", query=expression)["result"]
        return {tuple(series["metric"].values()): float(series["value"][1]) for series in found}

    def value(self, expression: str) -> float:
        [value] = self.query(expression).values()
        return value

    def wait_for(self, expression: str, seconds: float = 120, there: bool = True) -> None:
        until = time.monotonic() + seconds
        while bool(self.query(expression)) != there:
            assert time.monotonic() < until, f"{expression} {'never came' if there else 'stays'}"
            time.sleep(0.5)


@contextmanager
def process(command: list[object], environment: dict[str, str], log: Path) -> "Iterator[subprocess.Popen[str]]":
    """Runs during the block and is then terminated."""
    with log.open("w") as errors:
        started = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip
        try:
            yield started
        finally:
            started.terminate()
            with suppress(subprocess.TimeoutExpired):
                started.wait(timeout=30)
            started.kill()
            started.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def prometheus_config(folder: Path, discovery: Path, exporter: int) -> Path:
    """The repository's configuration with other addresses and an interval of one second."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    ray_nodes, dataset, _ = config["scrape_configs"]
    [listed] = ray_nodes["file_sd_configs"]
    assert listed["files"] == [f"/tmp/ray/{DISCOVERY}"], "Ray's default path"
    listed |= {"files": [str(discovery)], "refresh_interval": "1s"}
    dataset["static_configs"] = [{"targets": [f"127.0.0.1:{exporter}"]}]
    config["scrape_configs"] = [ray_nodes, dataset]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(MONITORING / "alerts.yml", folder)
    return folder / "prometheus.yml"


@dataclass(frozen=True)
class Watched:
    """A cluster on which jobs have run, and a Prometheus that was scraping it."""

    prometheus: Prometheus
    dashboard: str  # of Ray
    ingested: dict[str, Any]  # run.json


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    if not shutil.which("prometheus"):
        pytest.skip("no prometheus: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("monitoring")
    # Ray's metrics every second instead of every ten, forgotten after two; and a token, which Prometheus does not have.
    environment = os.environ | {
        "RAY_metrics_report_interval_ms": "1000", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    with ExitStack() as running:
        # Not below tmp_path, because the paths of Ray's sockets must be short.
        rays = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="hdm-ray-", ignore_cleanup_errors=True)))
        head = running.enter_context(process([sys.executable, "-c", HEAD, rays], environment, folder / "head.log"))
        exporter, port = free_port(), free_port()
        config = prometheus_config(folder, rays / DISCOVERY, exporter)
        running.enter_context(
            process(
                [
                    *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'series'}"),
                    *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"),
                ],
                environment,
                folder / "prometheus.log",
            )
        )
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        dataset, run = folder / "dataset", folder / "run"

        def job(script: str, *arguments: object) -> list[object]:
            return [sys.executable, ROOT / script, *arguments]

        def finish(script: str, *arguments: object) -> None:
            done = subprocess.run(
                list(map(str, job(script, *arguments))), env=environment, capture_output=True, text=True, timeout=300,
                check=False, cwd=ROOT,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]

        finish("pipeline/sample_data.py", "--out", folder / "raw", "--images", 400)
        assert head.stdout
        environment["RAY_ADDRESS"], _, dashboard = head.stdout.readline().strip().partition(" ")
        assert dashboard, (folder / "head.log").read_text()[-2000:]
        prometheus.wait_for('up{job="ray"} == 1')
        # Many shards, over several seconds: a series that appears between two scrapes has no rate.
        finish("pipeline/ingest.py", "--raw", folder / "raw", "--dataset", dataset, "--rows-per-shard", 10)
        running.enter_context(
            process(
                job("pipeline/exporter.py", "--dataset", dataset, "--port", exporter, "--every", 1),
                environment,
                folder / "exporter.log",
            )
        )
        finish("pipeline/caption.py", "--dataset", dataset)
        finish("pipeline/curate.py", "--dataset", dataset)
        ingested = json.loads((dataset / "images" / "run.json").read_text())
        training = job("trainer/run.py", "--stage", "demo", "--dataset", dataset, "--run", run, "--steps", 100_000)
        # A line every five steps, less often than Ray forgets metrics that are not set.
        training += ["--set", "log_every=5", "--price-per-hour", 1]
        with process(training, environment, folder / "training.log") as trained:
            prometheus.wait_for("ray_hdm_train_loss", seconds=300)
            yield Watched(prometheus, f"http://{dashboard}", ingested)
            assert trained.poll() is None, (folder / "training.log").read_text()[-2000:]
            trained.kill()  # saving a checkpoint would take longer


@pytest.mark.cluster
def test_metrics_are_scraped_without_the_clusters_token(watched: Watched) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{watched.dashboard}/api/prometheus/sd", timeout=10)
    assert watched.prometheus.query('up{job="ray"} == 1')


@pytest.mark.cluster
def test_ingest_exports_its_speed_and_rejected_rows_by_reason(watched: Watched) -> None:
    found = watched.prometheus
    assert found.value("max_over_time(sum(rate(ray_hdm_ingest_rows_total[15s]))[1h:1s])") > 0
    became = found.query("sum by (kind) (max_over_time(ray_hdm_ingest_rows_total[1h]))")
    refused = {(reason,): count for reason, count in watched.ingested["rejected"].items()}
    assert refused
    assert became == {("kept",): watched.ingested["rows_out"]} | refused
    left = found.value('max(max_over_time(ray_hdm_rows_left{task="ingest"}[1h]))')
    assert 0 < left <= watched.ingested["rows_in"]
    assert found.value("max(max_over_time(ray_hdm_longest_idle_seconds[1h]))") > 0


@pytest.mark.cluster
def test_captions_and_curation_are_counted(watched: Watched) -> None:
    kept = watched.ingested["rows_out"]
    counted = "sum by (kind) (max_over_time(ray_hdm_{}_rows_total[1h]))"
    assert watched.prometheus.query(counted.format("caption")) == {("captioned",): kept}
    assert watched.prometheus.query(counted.format("judging")) == {("done",): kept}
    assert watched.prometheus.query(counted.format("writing")) == {("done",): kept}


@pytest.mark.cluster
def test_a_training_exports_its_metrics_all_the_time(watched: Watched) -> None:
    found = watched.prometheus
    values = {name: found.query(f'ray_{GAUGE_PREFIX}{name}{{stage="demo"}}') for name in METRICS}
    shown = {name: next(iter(series.values())) for name, series in values.items() if series}
    assert all(math.isfinite(value) for value in shown.values())
    for name in ("step", "loss", "grad_norm", "learning_rate", "images_per_second", "hours_left", "seconds"):
        assert shown[name] > 0, name
    assert 0 <= shown["data_wait_share"] <= 1
    assert 0 <= shown["dollars"] <= 1
    assert shown["skipped_steps"] == 0
    # Also before the first line is written: Ray forgets metrics that are not set again within two seconds.
    assert found.value("max(count_over_time((ray_hdm_train_step == 0)[1h:1s]))") > 4
    assert 0 < found.value("max(max_over_time(ray_hdm_train_disk_used_share[1h]))") < 1


@pytest.mark.cluster
def test_the_exporter_counts_what_ingest_has_written(watched: Watched) -> None:
    found = watched.prometheus
    found.wait_for('hdm_dataset_selected_rows{folder="selections/demo"}')
    assert found.value("hdm_dataset_ingested_rows") == watched.ingested["rows_out"]
    refused = found.query("sum by (reason) (hdm_dataset_rejected_rows)")
    assert refused == {(reason,): count for reason, count in watched.ingested["rejected"].items()}


@pytest.mark.cluster
def test_every_rule_and_panel_can_be_evaluated_on_real_series(watched: Watched) -> None:
    """Finds labels that do not match, which promtool cannot."""
    groups = watched.prometheus.get("rules")["groups"]
    assert {rule["name"]: (rule["health"], rule.get("lastError")) for group in groups for rule in group["rules"]} == {
        rule["alert"]: ("ok", None) for rule in RULES
    }
    for expression in QUERIES.values():
        watched.prometheus.query(expression)


@pytest.mark.cluster
def test_gauges_of_ended_jobs_disappear(watched: Watched) -> None:
    watched.prometheus.wait_for("ray_hdm_rows_left", there=False)
