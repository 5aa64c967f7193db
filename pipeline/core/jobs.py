"""What every JOB file shares: errors of one line, exit codes, progress bars and the run record.

Exit codes: 0 done, 1 the job failed, 2 the command or its input is wrong.
"""

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from pipeline.core.errors import JobFailed, S3Refused, S3Unavailable, UsageError

T = TypeVar("T")


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
