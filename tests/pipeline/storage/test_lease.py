"""Leases: one writer per folder, also among processes that start together, and none after a job was killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import JobFailed, S3Refused, S3Unavailable, UsageError
from pipeline.storage import lease as leases
from pipeline.storage import s3
from pipeline.storage.lease import NAME, lease
from pipeline.storage.shards import Store

HOLD = """
import sys, time
from pipeline.storage.lease import lease
from pipeline.storage.shards import Store
from pipeline.core.errors import JobFailed
try:
    with lease(Store(sys.argv[1]), "images", "first.py"):
        print("held", flush=True)
        sys.stdin.read()
except JobFailed as error:
    print(error, flush=True)
"""


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = tmp_path if request.param == "local" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return Store(f"{place}/leased")


def start(store: Store) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, store.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_a_second_job_is_told_who_writes(store: Store) -> None:
    first = start(store)
    try:
        assert said(first) == "held"
        with pytest.raises(JobFailed) as refusal, lease(store, "images", "second.py"):
            pytest.fail("two jobs write")
        message = str(refusal.value)
        assert re.search(rf"/images/{NAME} is held by first\.py on \S+ \(process {first.pid}\) since \d{{4}}-", message)
        assert re.search(r"the lease expires in 1[0-2]\d s", message)
        assert "\n" not in message
        with lease(store, "captions", "second.py"):
            pass
        assert first.stdin
        first.stdin.close()
        assert first.wait(timeout=60) == 0
        with lease(store, "images", "second.py"):
            assert json.loads(store.read(f"images/{NAME}"))["job"] == "second.py"
    finally:
        first.kill()
        first.wait()
    assert not store.exists(f"images/{NAME}")


def test_the_lease_of_a_killed_job_on_this_machine_is_taken_over_at_once(store: Store) -> None:
    first = start(store)
    assert said(first) == "held"
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # dead, though its parent has not noticed
    try:
        with lease(store, "images", "second.py"):
            assert json.loads(store.read(f"images/{NAME}"))["pid"] == os.getpid()
    finally:
        first.wait()


def rewrite(store: Store, **changes: Any) -> None:
    record = json.loads(store.read(f"images/{NAME}"))
    store.write(f"images/{NAME}", json.dumps(record | changes).encode())


@pytest.mark.parametrize("change", [{"machine": "another", "host": "elsewhere"}, {"started": "?"}], ids=str)
def test_the_lease_of_another_machine_or_an_unknown_job_expires(
    store: Store, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    first = start(store)
    assert said(first) == "held"
    first.kill()
    first.wait()
    rewrite(store, **change)
    with pytest.raises(JobFailed, match=r"elsewhere|an unknown job"), lease(store, "images", "second.py"):
        pytest.fail("its process may live")
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 0.5)
    time.sleep(2)  # S3 gives ages in seconds
    with lease(store, "images", "second.py"):
        monkeypatch.setattr(leases, "EXPIRY_SECONDS", 120.0)  # of its own lease


def test_of_jobs_that_start_together_one_writes(store: Store) -> None:
    jobs = [start(store) for _ in range(4)]
    lines = [said(job) for job in jobs]
    assert sorted(line == "held" for line in lines) == [False, False, False, True], lines
    for job in jobs:
        job.communicate()


def test_of_jobs_that_take_over_together_one_writes(store: Store) -> None:
    first = start(store)
    assert said(first) == "held"
    first.kill()
    first.wait()
    won, barrier = [], threading.Barrier(4)

    def take() -> None:
        barrier.wait()
        try:
            with lease(store, "images", threading.current_thread().name):
                won.append(threading.current_thread().name)
                barrier.wait()
        except JobFailed:
            barrier.wait()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_lease_is_renewed_while_the_job_works(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_RENEWAL_SECONDS", 0.1)

    def renewed() -> float:
        content = store.tail(f"images/{NAME}", 10_000) or b"{}"  # empty while it is written
        return float(json.loads(content).get("renewed", 0))

    with lease(store, "images", "first.py"):
        before = renewed()
        wait_until(lambda: renewed() > before + 0.2)
    assert not store.exists(f"images/{NAME}")


def test_a_job_that_lost_its_lease_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_RENEWAL_SECONDS", 0.2)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work() -> None:
        with lease(store, "images", "first.py"):
            rewrite(store, token="of another", renewed=0)
            time.sleep(20)

    try:
        with pytest.raises(JobFailed, match="another job has taken it"):
            work()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert json.loads(store.read(f"images/{NAME}"))["token"] == "of another", "the other's lease stays"


class Unable(Exception):
    """No error that the storage is known to raise."""


@pytest.fixture
def unable_to_renew(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store in which a lease can be taken, but not renewed within its second."""
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 1.0)
    monkeypatch.setattr(leases, "_RENEWAL_SECONDS", 0.1)
    file = leases._S3File if store.is_remote else leases._LocalFile
    write = file.write

    def write_first(self: Any, content: bytes, version: str | None) -> str | None:
        if version is not None:
            raise Unable("no\nmore")
        return write(self, content, version)

    monkeypatch.setattr(file, "write", write_first)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield store
    signal.signal(signal.SIGINT, handler)


def test_a_job_that_cannot_renew_its_lease_is_interrupted(unable_to_renew: Store) -> None:
    def work() -> None:
        with lease(unable_to_renew, "images", "first.py"):
            time.sleep(20)

    started = time.monotonic()
    with pytest.raises(JobFailed, match=r"not renewed for 1 s \(Unable: no more\), and another job may have taken it"):
        work()
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    "end", [None, UsageError("no row is left"), KeyboardInterrupt()], ids=["well", "error", "stop"]
)
def test_a_job_whose_lease_expired_fails_however_it_ends(
    unable_to_renew: Store, monkeypatch: pytest.MonkeyPatch, end: BaseException | None
) -> None:
    monkeypatch.setattr(leases, "_RENEWAL_SECONDS", 60.0)  # it ends before the next attempt
    with pytest.raises(JobFailed, match="may have taken it"), lease(unable_to_renew, "images", "first.py"):  # noqa: PT012
        time.sleep(1.2)
        if end:
            raise end
    assert unable_to_renew.exists(f"images/{NAME}"), "it may be another's by now"


def test_a_silent_s3_is_named_although_the_lease_expired(unable_to_renew: Store) -> None:
    with pytest.raises(S3Unavailable, match="no proper answer"), lease(unable_to_renew, "images", "first.py"):  # noqa: PT012
        try:
            time.sleep(20)
        except KeyboardInterrupt:
            raise S3Unavailable("no proper answer") from None


def test_a_job_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lease(Store(str(tmp_path / "new")), "images", "first.py"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_lost_answers_do_not_lose_the_lease(bucket: str, s3_server: Any, tmp_path: Path) -> None:
    store = Store(f"{bucket}/{tmp_path.name}")
    lost = s3_server.failing("lose answer", when=lambda request: request.method == "PUT" and not failed)
    with lost as failed, lease(store, "images", "first.py"):
        assert len(failed) == 1
        assert json.loads(store.read(f"images/{NAME}"))["job"] == "first.py"


def test_a_conditional_write_compares_versions(bucket: str, tmp_path: Path) -> None:
    path = f"{bucket}/{tmp_path.name}/one"
    assert s3.read_versioned(path) is None
    first = s3.put_if(path, b"1", None)
    assert first
    assert s3.put_if(path, b"2", None) is None
    assert s3.put_if(path, b"2", '"0123"') is None
    second = s3.put_if(path, b"2", first)
    assert second
    found = s3.read_versioned(path)
    assert found
    assert found[:2] == (b"2", second)
    assert 0 <= found[2] < 60


def test_a_missing_bucket_is_named(bucket: str) -> None:
    missing = "s3://no-such-bucket/a"
    with pytest.raises(S3Refused, match="no bucket for"):
        s3.read_versioned(f"{missing}/images/{NAME}")
    for version in (None, '"0123"'):
        with pytest.raises(S3Refused, match="no bucket for"):
            s3.put_if(f"{missing}/images/{NAME}", b"1", version)
    with pytest.raises(S3Refused, match="create it"), lease(Store(missing), "images", "first.py"):
        pytest.fail("there is no place for a lease")


def test_an_answer_without_a_date_has_an_age(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{bucket}/{tmp_path.name}/one"
    assert s3.put_if(path, b"1", None)
    files = s3.connect(path)
    answer = files.call_s3

    def undated(method: str, **request: Any) -> Any:
        found = answer(method, **request)
        found["ResponseMetadata"]["HTTPHeaders"].pop("date", None)
        return found | {"LastModified": found["LastModified"] - timedelta(hours=1)}

    monkeypatch.setattr(files, "call_s3", undated)
    found = s3.read_versioned(path)
    assert found
    assert 3590 < found[2] < 3700
