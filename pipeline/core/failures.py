"""Faults of a whole job, which end it, and failures of a shard, which leave all others to be done."""

import errno
import re
from typing import Final

from pipeline.core.errors import JobStopped, S3Refused, S3Unavailable

_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_SAME_FAILURES: Final = 20  # shards that fail in a row for the same reason, before the job stops


def is_fatal(error: Exception) -> bool:
    """True if every other shard would fail for the same reason: a full disk or quota, S3, or the step says so."""
    return isinstance(error, (JobStopped, S3Refused, S3Unavailable)) or getattr(error, "errno", 0) in _DISK_FULL


def reason(error: Exception) -> str:
    """One line about an error; with its type, unless its message is written for users."""
    line = str(error).strip().partition("\n")[0]
    return line if is_fatal(error) else f"{type(error).__name__}: {line}"


class ShardFailures(dict[str, str]):
    """The reason for each shard that failed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self._kind, self._in_a_row = "", 0

    def fail(self, name: str, why: str, fatal: bool) -> None:
        """Adds a shard, unless it is there. Raises JobStopped if the failure is fatal, or the same as that of many
        shards just before it."""
        if fatal:
            raise JobStopped(why)
        if name in self:
            return
        self[name] = why
        kind = re.sub(r"\S*/\S*|'[^']*'|\d+", "", why)  # without names of files and numbers
        self._kind, self._in_a_row = kind, self._in_a_row + 1 if kind == self._kind else 1
        if self._in_a_row >= _SAME_FAILURES:
            raise JobStopped(f"{_SAME_FAILURES} shards in a row failed, the last one, {name}, with: {why}")

    def succeed(self) -> None:
        """Takes note that a shard is finished."""
        self._kind, self._in_a_row = "", 0
