"""S3 with faults: retries, refusals, commits, and the number of requests that a read costs."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import S3Refused, S3Unavailable
from pipeline.storage import s3
from pipeline.storage.shards import Store, list_files

RunJob = Callable[..., CompletedProcess[str]]

SCHEMA = pa.schema(
    [("id", pa.string()), ("image", pa.binary()), ("width", pa.int32()), ("tags", pa.list_(pa.string()))]
)
ROWS = pa.Table.from_pylist(
    [{"id": f"danbooru:{n}", "image": bytes([n]) * 20_000, "width": n, "tags": [f"tag {n}"]} for n in range(50)], SCHEMA
)
LARGE = os.urandom(2 * s3._PART_BYTES + 1)  # uploaded in parts


@pytest.fixture(autouse=True)
def fresh_connection() -> Iterator[None]:
    """Each test connects with its own environment."""
    s3._connect.cache_clear()
    yield
    s3._connect.cache_clear()


@pytest.fixture
def store(bucket: str, request: pytest.FixtureRequest) -> Store:
    return Store(f"{bucket}/{request.node.name}".replace("[", "-").replace("]", ""))


@pytest.fixture
def two_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")


def write_groups(store: Store, name: str, groups: int) -> None:
    with store.writing_table(name, SCHEMA) as write:
        for _ in range(groups):
            write(ROWS)


def methods(requests: list[Any]) -> list[str]:
    return [request.method for request in requests]


# --- Retries ----------------------------------------------------------------------------------------------------------


def test_files_written_and_read_through_faults_equal_local_ones(
    store: Store, s3_server: Any, transient_faults: tuple[str, ...], tmp_path: Path
) -> None:
    direct = Store(str(tmp_path))
    write_groups(direct, "images/one.parquet", 3)
    with s3_server.failing(*transient_faults, every=3) as failed:
        write_groups(store, "images/one.parquet", 3)
        store.write("large", LARGE)
        store.write("gone.json", b"{}")
        store.remove("gone.json")
        assert store.shards("images") == ["one"]
        assert sorted(list_files(store.root)) == [store.path("images/one.parquet"), store.path("large")]
        assert store.read("images/one.parquet") == direct.read("images/one.parquet")
        assert store.read_table("images/one.parquet").equals(direct.read_table("images/one.parquet"))
        assert store.read("large") == LARGE
        assert not store.exists("gone.json")
    assert len(failed) > len(transient_faults)


def test_a_silent_server_times_out_and_is_asked_again(
    store: Store, s3_server: Any, monkeypatch: pytest.MonkeyPatch, two_attempts: None
) -> None:
    store.write("spoken.json", b"after all")
    s3._connect.cache_clear()
    monkeypatch.setattr(s3, "_READ_SECONDS", 0.3)
    with s3_server.failing("silence", "silent answer", every=2) as failed:
        for _ in range(2):
            assert store.read("spoken.json") == b"after all"
    assert len(failed) > 1


@pytest.mark.parametrize(
    ("fault", "work", "method", "most"),
    [
        ("500 InternalError", lambda store: store.exists("a"), "HEAD", 2),
        ("503 SlowDown", lambda store: store.shards(), "GET", 2),
        # aiohttp retries a broken connection once, immediately, before it counts as an attempt.
        ("refuse", lambda store: store.read("a"), "HEAD", 4),
        ("cut request", lambda store: store.write("b", b"new"), "PUT", 4),
        ("lose answer", lambda store: store.remove("a"), "DELETE", 4),
    ],
    ids=["HEAD", "LIST", "GET", "PUT", "DELETE"],
)
def test_a_permanent_failure_is_tried_as_often_as_configured(
    store: Store,
    s3_server: Any,
    two_attempts: None,
    fault: str,
    work: Callable[[Store], object],
    method: str,
    most: int,
) -> None:
    with s3_server.counting() as requests, s3_server.failing(fault), pytest.raises(S3Unavailable) as error:
        work(store)
    assert set(methods(requests)) == {method}
    assert 2 <= len(requests) <= most
    assert store.root in str(error.value)
    assert "\n" not in str(error.value)


def test_a_body_that_always_breaks_off_is_requested_as_often_as_configured(
    store: Store, s3_server: Any, two_attempts: None
) -> None:
    store.write("a", b"some bytes")
    broken = s3_server.failing("cut answer", when=lambda request: request.method == "GET")
    with s3_server.counting() as requests, broken, pytest.raises(S3Unavailable):
        store.read("a")
    assert methods(requests) == ["HEAD", "GET", "GET"]


def test_there_are_no_waits_without_faults(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("first", b"")  # connects
    waits: list[float] = []
    sleep, sleep_async = time.sleep, asyncio.sleep

    def slept(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():  # others are of datasets of other tests
            waits.append(seconds)
        sleep(seconds)

    def slept_async(seconds: float, *result: Any) -> Any:
        waits.append(seconds)
        return sleep_async(seconds, *result)

    def seconds() -> float:
        started = time.monotonic()
        store.write("one.json", b"{}")
        store.read("one.json")
        return time.monotonic() - started

    monkeypatch.setattr(time, "sleep", slept)
    monkeypatch.setattr(asyncio, "sleep", slept_async)
    fastest = min(seconds() for _ in range(20))
    assert not any(waits)
    # A wait for the network, such as for "100 Continue", delays every round; other work on this machine only some.
    assert fastest < 0.1


@pytest.mark.parametrize("fault", ["403 AccessDenied", "403 SignatureDoesNotMatch", "400 InvalidRequest"])
def test_a_refusal_is_not_retried_and_names_the_fix(store: Store, s3_server: Any, fault: str) -> None:
    with s3_server.counting() as requests, s3_server.failing(fault), pytest.raises(S3Refused, match="AWS_PROFILE"):
        store.shards()
    assert methods(requests) == ["GET"]


# --- Commits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"small", LARGE], ids=["one PUT", "parts"])
def test_an_upload_that_fails_half_way_leaves_nothing(
    store: Store, s3_server: Any, two_attempts: None, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with s3_server.failing("cut request", when=lambda request: request.method == "PUT"), pytest.raises(S3Unavailable):
        store.write("half", data)
    assert not store.exists("half")
    assert s3.connect(store.root).list_multipart_uploads("datasets") == []
    assert list(tmp_path.iterdir()) == []


def test_an_upload_is_whole_if_the_answer_to_its_completion_is_lost(store: Store, s3_server: Any) -> None:
    completion = iter([True])
    with s3_server.failing(
        "lose answer",
        when=lambda request: "uploadId" in request.target and request.method == "POST" and next(completion, False),
    ) as failed:
        store.write("large", LARGE)
    assert len(failed) == 1
    assert store.read("large") == LARGE
    assert s3.connect(store.root).list_multipart_uploads("datasets") == []


def test_files_of_other_processes_are_seen_at_once(store: Store) -> None:
    import s3fs

    write_groups(store, "images/one.parquet", 1)
    assert store.shards("images") == ["one"]
    assert not store.exists("images/two.parquet")
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    other.copy(store.path("images/one.parquet"), store.path("images/two.parquet"))
    assert store.exists("images/two.parquet")
    assert store.shards("images") == ["one", "two"]
    other.rm(store.path("images/one.parquet"))
    assert list(list_files(store.root)) == [store.path("images/two.parquet")]


def test_transfer_files_of_a_killed_process_are_removed_by_the_next_but_not_those_in_use(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, then: str) -> int:
        imports = "import os, sys\nfrom pipeline.storage.shards import Store\n"
        script = f"{imports}with Store(sys.argv[1]).committed({name!r}): {then}"
        return subprocess.run([sys.executable, "-c", script, store.root], env=here, check=False, timeout=60).returncode

    here = os.environ | {"TMPDIR": str(tmp_path)}
    assert write("killed", "os.kill(os.getpid(), 9)") == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with store.committed("in-use") as in_use:
        assert [str(path) for path in tmp_path.iterdir()] == [in_use]
        assert write("another", "pass") == 0
        assert [str(path) for path in tmp_path.iterdir()] == [in_use]
    assert list(tmp_path.iterdir()) == []
    assert [store.exists(name) for name in ("killed", "in-use", "another")] == [False, True, True]


# --- Requests ---------------------------------------------------------------------------------------------------------


def test_a_footer_costs_one_request_and_the_images_of_a_row_group_another(store: Store, s3_server: Any) -> None:
    write_groups(store, "one.parquet", 4)
    with s3_server.counting() as requests:
        store.rows("one.parquet")
    assert methods(requests) == ["HEAD", "GET"]
    with s3_server.counting() as requests, store.open("one.parquet") as file:
        pq.ParquetFile(file).read_row_group(2, columns=["image"])
    assert methods(requests) == ["HEAD", "GET", "GET"]


def test_small_columns_cost_one_request_per_row_group_and_fetch_no_image(store: Store, s3_server: Any) -> None:
    large = ROWS.set_column(1, "image", pa.array([os.urandom(40_000) for _ in range(50)], pa.binary()))
    with store.writing_table("one.parquet", SCHEMA) as write:
        for _ in range(4):
            write(large)
    with s3_server.counting() as requests:
        assert store.read_table("one.parquet", ["id", "width", "tags"]).num_rows == 200
    gets = [request.headers["Range"].removeprefix("bytes=").split("-") for request in requests[1:]]
    assert len(gets) <= 1 + 4 + 1  # the footer; before, between and after the four image columns
    assert sum(int(end) - int(start) for start, end in gets) < large.nbytes


# --- Access -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anonymous", "signed"), [("", True), ("1", False), ("other,datasets", False), ("other", True)]
)
def test_public_buckets_are_read_without_keys(
    store: Store, s3_server: Any, monkeypatch: pytest.MonkeyPatch, anonymous: str, signed: bool
) -> None:
    monkeypatch.setenv("HDM_S3_ANONYMOUS", anonymous)
    with s3_server.counting() as requests:
        store.shards()
    assert all(("Authorization" in request.headers) == signed for request in requests)


def test_a_profile_provides_keys_and_endpoint(
    store: Store, s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, keys = tmp_path / "config", tmp_path / "credentials"
    config.write_text(f"[profile lab]\nendpoint_url = {s3_server.url}\nregion = us-east-1\n")
    keys.write_text("[lab]\naws_access_key_id = KEYOFTHELAB\naws_secret_access_key = secret\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with s3_server.counting() as requests:
        store.shards()
    assert all("Credential=KEYOFTHELAB/" in request.headers["Authorization"] for request in requests)
    s3._connect.cache_clear()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(S3Refused, match="nobody"):
        store.shards()


def test_threads_and_forked_children_can_read(store: Store) -> None:
    store.write("shared", b"same for all")
    script = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pipeline.storage.shards import Store
store = Store(sys.argv[1])
with ThreadPoolExecutor(8) as pool:
    assert set(pool.map(store.read, ["shared"] * 32)) == {b"same for all"}
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0 if store.read("shared") == b"same for all" else 1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, store.root], check=True, timeout=60)


# --- Jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "environment", "code", "named"),
    [
        ("datasets/a", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "3"}, 1, "127.0.0.1:1"),
        ("datasets/a", {"AWS_ENDPOINT_URL": "nonsense"}, 2, "nonsense"),
        ("datasets/a", {"AWS_MAX_ATTEMPTS": "many"}, 2, "AWS_MAX_ATTEMPTS is many"),
        ("no-such-bucket/a", {}, 2, "create it"),
        ("", {}, 2, "names no bucket"),
    ],
    ids=["dead endpoint", "no endpoint", "no number", "no bucket", "no name"],
)
def test_a_job_fails_with_one_line(
    run_job: RunJob, bucket: str, where: str, environment: dict[str, str], code: int, named: str
) -> None:
    started = time.monotonic()
    job = run_job("pipeline/caption.py", "--dataset", f"s3://{where}", environment=environment)
    assert time.monotonic() - started < 20
    assert job.returncode == code, job.stderr
    [line] = job.stderr.splitlines()
    assert line.startswith({1: "failed: ", 2: "error: "}[code])
    assert named in line
