"""Leases: at most one job writes a folder of a dataset at a time.

A lease is a small file in the folder that names the job. It is written under a condition (S3: If-None-Match and
If-Match; local: a file lock), renewed by a thread, and removed when the job ends. The lease of a killed job is taken
over: at once by a job on the same machine, where its process is seen to be gone, and elsewhere when it was not renewed
for EXPIRY_SECONDS. Ages are differences of the storage's own clock. A job that could not renew its lease for that long
has lost it: it is interrupted, and fails even if it has done its work, because another job may have written too.
"""

import fcntl
import json
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol

from pipeline.core.errors import JobFailed, S3Refused, S3Unavailable
from pipeline.storage import s3
from pipeline.storage.shards import Store

NAME: Final = "lease.json"
EXPIRY_SECONDS: Final = 120.0  # without renewal

_RENEWAL_SECONDS: Final = 20.0
_TRIES: Final = 5  # each is lost only to another job that starts in the same moment


@dataclass(frozen=True)
class _Holder:
    """The job that has a lease."""

    job: str
    host: str
    machine: str  # distinguishes machines, boots and containers in which the same process number is another process
    pid: int
    process_started: str  # distinguishes processes with the same number; "" if unknown
    started: float  # Unix seconds
    token: str


@contextmanager
def lease(dataset: Store, folder: str, job: str) -> Iterator[None]:
    """Holds the lease of a folder inside the block. `job` names the holder to others. A job lists the folder inside the
    block, because another job may have written it until then.

    Raises JobFailed if another job holds it. Raises JobFailed at the end of the block, however that ends, if the lease
    was lost because it could not be renewed in time; errors of S3, which say why, are raised as they are.
    """
    file: _LeaseFile = _S3File(dataset, folder) if dataset.is_remote else _LocalFile(dataset, folder)
    holder = _Holder(job, platform.node(), _machine(), os.getpid(), _process_started(os.getpid()), time.time(), "")
    renewal = _Renewal(file, holder)
    try:
        try:
            yield
        finally:
            renewal.end()
    except (S3Refused, S3Unavailable):
        raise
    except BaseException as error:
        if renewal.is_lost:
            raise renewal.loss() from error
        raise
    if renewal.is_lost:
        raise renewal.loss()


class _LeaseFile(Protocol):
    """A file that is replaced only by who knows its version."""

    path: str

    def read(self) -> tuple[bytes, str, float] | None:
        """Content, version and age in seconds; None if there is no file."""

    def write(self, content: bytes, version: str | None) -> str | None:
        """Writes the file if it has this version (None: if there is none). Returns the new version, None if it has
        another one."""

    def remove(self, version: str) -> None:
        """Removes the file if it has this version."""


class _S3File:
    def __init__(self, dataset: Store, folder: str) -> None:
        self.path = dataset.path(f"{folder}/{NAME}")

    def read(self) -> tuple[bytes, str, float] | None:
        return s3.read_versioned(self.path)

    def write(self, content: bytes, version: str | None) -> str | None:
        return s3.put_if(self.path, content, version)

    def remove(self, version: str) -> None:
        # S3 has no conditional DELETE. A lease that is renewed is nobody else's.
        s3.remove(self.path)


class _LocalFile:
    """The version is the content. A lock on the file makes comparing and writing one step."""

    def __init__(self, dataset: Store, folder: str) -> None:
        self.path = dataset.path(f"{folder}/{NAME}")
        parents = [Path(self.path).parent, *Path(self.path).parents]
        self._new_folders = [parent for parent in parents if not parent.exists()]

    def read(self) -> tuple[bytes, str, float] | None:
        try:
            with open(self.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                content = file.read()
                age = self._now() - os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None
        return (content, content.decode(errors="replace"), age) if content else None

    def _now(self) -> float:
        """The time of the file system, which may be another machine's."""
        probe = Path(f"{self.path}.{uuid.uuid4().hex[:8]}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def write(self, content: bytes, version: str | None) -> str | None:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with self._locked(os.O_CREAT) as file:
            if os.pread(file, 1 << 20, 0).decode(errors="replace") != (version or ""):
                return None
            os.ftruncate(file, 0)
            os.pwrite(file, content, 0)
            os.fsync(file)
        return content.decode()

    def remove(self, version: str) -> None:
        with suppress(FileNotFoundError), self._locked() as file:
            if os.pread(file, 1 << 20, 0).decode(errors="replace") == version:
                os.unlink(self.path)
        for folder in self._new_folders:  # of a job that wrote nothing
            with suppress(OSError):
                folder.rmdir()

    @contextmanager
    def _locked(self, flags: int = 0) -> Iterator[int]:
        while True:
            file = os.open(self.path, os.O_RDWR | flags, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file).st_nlink:  # not removed before it was locked
                    yield file
                    return
            finally:
                os.close(file)


class _Renewal:
    """Takes a lease and renews it in a thread until `end`. The thread interrupts the main thread, as Ctrl-C does, when
    the lease is lost."""

    def __init__(self, file: _LeaseFile, holder: _Holder) -> None:
        self._file = file
        self._record = asdict(holder) | {"token": uuid.uuid4().hex}
        self._is_taken = False  # by another job
        self._failure = ""  # of the latest attempt to renew it
        self._written = time.monotonic()  # before the request, so that the file is never older than this says
        self._version = self._take()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_lost, daemon=True, name="lease")
        self._thread.start()

    @property
    def _age(self) -> float:
        """Seconds since the lease was taken or renewed."""
        return time.monotonic() - self._written

    @property
    def is_lost(self) -> bool:
        """Whether another job has taken the lease or may take it."""
        return self._is_taken or self._age > EXPIRY_SECONDS

    def loss(self) -> JobFailed:
        """The error of a job whose lease is lost."""
        why = f" ({self._failure})" if self._failure else ""
        other = "another job has taken it" if self._is_taken else "another job may have taken it"
        return JobFailed(
            f"{self._file.path} was not renewed for {EXPIRY_SECONDS:.0f} s{why}, and {other}; run the same command "
            "again when no other job writes this folder"
        )

    def _content(self) -> bytes:
        """New at every renewal, so that the version changes."""
        return json.dumps(self._record | {"renewed": time.time()}).encode()

    def _is_own(self, content: bytes) -> bool:
        return self._record["token"].encode() in content

    def _take(self) -> str:
        for _ in range(_TRIES):
            found = self._file.read()
            if found and self._is_own(found[0]):
                return found[1]  # the answer to this job's own request was lost, and the request repeated
            if found:
                _check_free(self._file.path, found[0], found[2])
            self._written = time.monotonic()
            if version := self._file.write(self._content(), found[1] if found else None):
                return version
        raise JobFailed(f"other jobs are starting to write {self._file.path}; run the same command again")

    def _renew_until_lost(self) -> None:
        while not self._stop.wait(_RENEWAL_SECONDS):
            try:
                self._renew()
                self._failure = ""
            except Exception as error:  # whatever it is, the lease is not renewed
                self._failure = " ".join(f"{type(error).__name__}: {error}".split())
            if self.is_lost:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    def _renew(self) -> None:
        started = time.monotonic()
        version = self._file.write(self._content(), self._version)
        if version is None:
            found = self._file.read()
            if not (found and self._is_own(found[0])):
                self._is_taken = True
                return
            version = found[1]  # the answer to an earlier request was lost
        self._version, self._written = version, started

    def end(self) -> None:
        """Ends the renewal, and removes the lease unless another job may have taken it."""
        self._stop.set()
        self._thread.join()
        if not self._is_taken and self._age < EXPIRY_SECONDS - _RENEWAL_SECONDS:
            with suppress(OSError, S3Refused, S3Unavailable):  # it expires by itself
                self._file.remove(self._version)


def _check_free(path: str, content: bytes, age: float) -> None:
    """Raises JobFailed if the lease with this content still holds."""
    if age > EXPIRY_SECONDS:
        return
    try:
        record = json.loads(content)
        holder = _Holder(**{name: record[name] for name in _Holder.__dataclass_fields__})
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.started))
    except (ValueError, KeyError, TypeError):
        who = "an unknown job"
    else:
        if holder.machine == _machine() and _process_started(holder.pid) != holder.process_started:
            return
        who = f"{holder.job} on {holder.host} (process {holder.pid}) since {since}"
    raise JobFailed(
        f"{path} is held by {who}: wait until that job ends, or stop it. If it was killed, the lease expires in "
        f"{max(1, EXPIRY_SECONDS - age):.0f} s"
    )


def _machine() -> str:
    parts = [platform.node()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _process_started(pid: int) -> str:
    """The start of a living process in ticks since the machine's; "" if there is none, or if it is unknown."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]
