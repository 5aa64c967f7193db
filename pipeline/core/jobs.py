"""What every job file shares: argument parsing, one-line errors, exit codes and default paths.

Exit codes: 0 done, 1 the job failed, 2 the command or its input is wrong, 130 stopped.
"""

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

from pipeline.core.errors import JobFailed, S3Refused, StorageUnavailable, UsageError

_OUT_OF_REACH: Final = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTUNREACH)
_OUTPUT_FLAGS: Final = ("dataset", "run", "checkpoints", "checkpoints_copy", "out")


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError, so that its errors take one line like all others of a job."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also refuses to write into the folder that `ray job submit --working-dir` uploaded: every node has a copy of
        its own, which Ray removes some time after the job."""
        found, rest = super().parse_known_args(args, namespace)
        for name in _OUTPUT_FLAGS if "working_dir" in submission().get("runtime_env", {}) else ():
            path = getattr(found, name, None) or "s3://"
            if "://" not in path and not os.path.isabs(os.path.expanduser(path)):
                raise UsageError(
                    f"--{name.replace('_', '-')} {path} would be in the uploaded folder, which Ray removes: give "
                    "s3://bucket/prefix or the full path of a folder that all nodes share, by this flag or by "
                    "HDM_DATASET and HDM_RUN in the env_vars of --runtime-env-json"
                )
        return found, rest


def submission() -> dict[str, Any]:
    """`runtime_env` and `metadata` of a job that was started by `ray job submit`; {} for all other jobs."""
    config: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return config if "job_submission_id" in config.get("metadata", {}) else {}


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a job's `main` and exits with its exit code. Unexpected exceptions keep their traceback."""
    # Treat SIGTERM as Ctrl-C: the job unwinds and stops the Ray that it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Ray must not join or start another cluster by itself, as in a thread that outlives the job's connection.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        main()
    except (UsageError, S3Refused) as error:
        _exit(f"error: {error}", 2)
    except (JobFailed, StorageUnavailable) as error:
        _exit(f"failed: {error}", 1)
    except KeyboardInterrupt:
        _exit("stopped; run the same command to go on", 130)
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _exit(f"error: {error}; give a path of the right kind that this user may write to", 2)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _exit(f"failed: {error}; make room and run the same command again", 1)
        if error.errno in _OUT_OF_REACH:
            _exit(f"failed: {error}; run the same command again when the folder can be read", 1)
        raise
    sys.exit(0)


def _exit(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def local_path(flag: str, path: str) -> Path:
    """Raises UsageError for a URL, which would be taken for the name of a local folder."""
    if "://" in path:
        raise UsageError(f"{flag} {path} must be a path on this machine's file system, mounted on every node")
    return Path(path)


def default_dataset() -> str:
    """The dataset if --dataset is not given."""
    return os.environ.get("HDM_DATASET") or "dataset"


def default_run() -> str:
    """The training run if --run is not given."""
    return os.environ.get("HDM_RUN") or "run"
