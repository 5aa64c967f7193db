"""Whether the error of one file is that of its whole folder, as when the server of a network folder does not answer."""

import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from pipeline.core.errors import StorageUnavailable

# What Linux reports if the server of a network folder cannot be reached, or no longer knows what it was asked for.
_NETWORK: Final = frozenset(
    {
        errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
        errno.ENETUNREACH, errno.ENETRESET, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ESHUTDOWN,
        errno.EREMOTEIO,
    }
)  # fmt: skip
_PROBED: Final = 3  # other files


def is_network_error(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _NETWORK


def check_reachable(root: str, error: OSError, others: Sequence[str]) -> None:
    """StorageUnavailable if `error`, of a file below the local folder `root`, is not one of that file alone.

    That is an error of the network; any error if `root` cannot be listed or is empty, as an unmounted folder is; and
    EIO, which a damaged disk reports too, if none of the first few `others`, paths of files beside it, can be read.
    """
    if is_network_error(error):
        raise _unavailable(root, error) from error
    try:
        with os.scandir(root) as entries:
            is_empty = next(entries, None) is None
    except OSError as of_root:
        raise _unavailable(root, of_root) from error
    if is_empty:
        raise StorageUnavailable(f"{root} is empty on {socket.gethostname()}; is it mounted?") from error
    probed = others[:_PROBED]
    if error.errno == errno.EIO and probed and not any(map(_is_readable, probed)):
        raise _unavailable(root, error) from error


def _unavailable(root: str, error: OSError) -> StorageUnavailable:
    return StorageUnavailable(f"{root} cannot be read on {socket.gethostname()} ({os.strerror(error.errno or 0)})")


def _is_readable(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is in memory proves nothing
            return bool(file.read(1))
    except OSError:
        return False
