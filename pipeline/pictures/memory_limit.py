"""A limit on the memory of a block of code, so that a hostile picture costs itself and not its machine."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Inside the block, this process can allocate at most `more` bytes beyond what it has; allocations beyond fail, in
    Python with MemoryError. 0 sets no limit. Applies to all threads of the process (RLIMIT_DATA, getrlimit(2))."""
    if not more:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limit = data + more
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
