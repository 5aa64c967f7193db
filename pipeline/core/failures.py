"""Faults of a whole job, which end it, and failures of a shard, which leave all others to be done."""

import errno
from typing import Final

from pipeline.core.errors import JobStopped, S3Refused, S3Unavailable

_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def is_fatal(error: Exception) -> bool:
    """True if every other shard would fail for the same reason: a full disk or quota, S3, or the step says so."""
    return isinstance(error, (JobStopped, S3Refused, S3Unavailable)) or getattr(error, "errno", 0) in _DISK_FULL


def reason(error: Exception) -> str:
    """One line about an error; with its type, unless its message is written for users."""
    line = str(error).strip().partition("\n")[0]
    return line if is_fatal(error) else f"{type(error).__name__}: {line}"
