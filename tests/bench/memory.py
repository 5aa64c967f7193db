"""Memory and CPU time of a process and all of its descendants together, while they run; Linux only."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_LOOK_SECONDS = 1.0  # a look takes some 50 ms of a CPU where processes are large


@dataclass
class Usage:
    peak: int = 0  # bytes of all processes; what they share, such as Ray's object store, counts once
    peak_of_first: int = 0  # bytes of the process that was asked for, alone
    cpu_by_process: dict[int, float] = field(default_factory=dict)

    @property
    def cpu_seconds(self) -> float:
        return sum(self.cpu_by_process.values())

    def look(self, pid: int) -> None:
        processes = family(pid)
        memory = {process: proportional_memory(process) for process in processes}
        self.peak = max(self.peak, sum(memory.values()))
        self.peak_of_first = max(self.peak_of_first, memory[pid])
        for process in processes:
            self.cpu_by_process[process] = max(cpu_seconds(process), self.cpu_by_process.get(process, 0.0))


@contextmanager
def watching(pid: int) -> Iterator[Usage]:
    """What a process and its descendants use while the block lasts, looked at once a second."""
    usage, ends = Usage(), threading.Event()

    def watch() -> None:
        while not ends.wait(_LOOK_SECONDS):
            usage.look(pid)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield usage
    finally:
        ends.set()
        watcher.join()


def family(pid: int) -> set[int]:
    """A process and all of its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(_fields(stat)[1])
        except OSError:
            continue
    found, size = {pid}, 0
    while size < len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def proportional_memory(pid: int) -> int:
    """Bytes; 0 for a process that ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def cpu_seconds(pid: int) -> float:
    """User's and system's; 0 for a process that ended."""
    try:
        user, system = _fields(Path(f"/proc/{pid}/stat"))[11:13]
    except OSError:
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _fields(stat: Path) -> list[str]:
    """Those after the name, which may have spaces: state, parent ..."""
    return stat.read_text().rpartition(")")[2].split()
