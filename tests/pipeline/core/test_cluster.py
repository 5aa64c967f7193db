"""Ray's start on a busy machine, and work that is sent to a node."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import ray

from pipeline.core import cluster
from pipeline.core.cluster import node_resources, nodes_of, run_on_node, start_local
from pipeline.core.errors import JobFailed, UsageError

# What Ray says if its agents need more than 15 seconds.
TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to\nstart."


@pytest.fixture
def failing_starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[subprocess.Popen[bytes]]]:
    """failing_starts(n): the next n starts of Ray fail and leave a process each. Returns these."""

    def fail(times: int) -> list[subprocess.Popen[bytes]]:
        left: list[subprocess.Popen[bytes]] = []

        def init(**options: object) -> object:
            if len(left) == times:
                return options
            left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]))
            raise Exception(TIMED_OUT)

        monkeypatch.setattr(ray, "init", init)
        return left

    for name in cluster._START_SECONDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(logging.getLogger("ray"), "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logging.getLogger("ray"), "propagate", False)
    return fail


def test_a_start_of_ray_that_fails_is_reported_and_repeated_and_leaves_no_process(
    failing_starts: Callable[[int], list[subprocess.Popen[bytes]]], capfd: pytest.CaptureFixture[str]
) -> None:
    left = failing_starts(2)
    assert start_local(num_cpus=1) == {"address": "local", "log_to_driver": False, "num_cpus": 1}
    assert [process.wait(timeout=60) for process in left] == [-15, -15]
    assert capfd.readouterr().err.count("trying again\n") == 2
    assert all(
        int(os.environ[name]) > 30 for name in ("RAY_raylet_start_wait_time_s", "RAY_gcs_server_port_wait_time_s")
    )


def test_if_ray_never_starts_the_job_fails_with_one_line(
    failing_starts: Callable[[int], list[subprocess.Popen[bytes]]],
) -> None:
    failing_starts(99)
    with pytest.raises(JobFailed, match="did not start on this machine in 4 attempts") as failed:
        start_local(num_cpus=1)
    assert "timed out during startup" in str(failed.value)
    assert "\n" not in str(failed.value)


def fail_with(error: Exception) -> None:
    raise error


@pytest.mark.usefixtures("ray_address")
def test_work_on_a_node_returns_its_result_or_the_error_of_its_user_in_one_line() -> None:
    assert run_on_node(partial(int, "7"), {}, {}, "count") == 7
    with pytest.raises(UsageError, match=r"^give another model$"):
        run_on_node(partial(fail_with, UsageError("give another model")), {}, {}, "look up")
    with pytest.raises(JobFailed, match=r"^look up: ValueError: no such thing$"):
        run_on_node(partial(fail_with, ValueError("no\nsuch thing")), {}, {}, "look up")


@pytest.mark.usefixtures("ray_address")
def test_on_a_single_machine_any_node_does_every_kind_of_work() -> None:
    assert node_resources("captioner") == {}
    [node] = nodes_of("captioner")
    assert node["CPU"] == 3


def test_where_nodes_offer_a_kind_of_work_only_they_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 1.0}, {"CPU": 8.0, "captioner": 1.0}]
    monkeypatch.setattr(cluster, "nodes", lambda: nodes)
    assert node_resources("captioner") == {"captioner": 0.01}
    assert nodes_of("captioner") == nodes[1:]
    assert nodes_of("trainer") == nodes
