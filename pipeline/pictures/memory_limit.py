"""Limits on the memory that decoding takes, so that a hostile or huge picture costs itself and not its machine."""

import fcntl
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

# Larger pictures are rare: each process reserves memory for one of this size, and a machine decodes larger ones one at
# a time.
LARGE_PIXELS: Final = 25_000_000
PIXEL_BYTES: Final = 18  # the most that decoding takes, see DecodeLimits


def decoding_memory(max_pixels: int = LARGE_PIXELS) -> int:
    """Bytes that a process which decodes one picture at a time should reserve for it."""
    return PIXEL_BYTES * min(max_pixels, LARGE_PIXELS)


@contextmanager
def one_large_picture(pixels: int) -> Iterator[None]:
    """Waits, for a picture of more than LARGE_PIXELS, until no other process of this user decodes such a picture."""
    if pixels <= LARGE_PIXELS:
        yield
        return
    with ExitStack() as lock:
        with suppress(OSError):  # a file of another user, a file system without locks: decoding does not depend on it
            path = os.path.join(tempfile.gettempdir(), f"hdm-large-picture-{os.getuid()}")
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            lock.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by the kernel
        yield


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Inside the block, this process can allocate at most `more` bytes beyond what it has; allocations beyond fail, in
    Python with MemoryError. 0 sets no limit. Applies to all threads of the process (RLIMIT_DATA, getrlimit(2))."""
    if not more:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limit = data + more if hard == resource.RLIM_INFINITY else min(data + more, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
