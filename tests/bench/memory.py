"""Memory and CPU time of a process together with all its descendants. Linux only: reads /proc."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_INTERVAL = 1.0  # seconds between measurements; one takes about 50 ms of CPU time if the processes are large


@dataclass
class Usage:
    peak: int = 0  # bytes of all processes; shared memory, such as Ray's object store, counts once
    peak_of_root: int = 0  # bytes of the root process alone
    cpu_by_process: dict[int, float] = field(default_factory=dict)

    @property
    def cpu_seconds(self) -> float:
        return sum(self.cpu_by_process.values())

    def update(self, pid: int) -> None:
        processes = process_tree(pid)
        memory = {process: proportional_memory(process) for process in processes}
        self.peak = max(self.peak, sum(memory.values()))
        self.peak_of_root = max(self.peak_of_root, memory[pid])
        for process in processes:
            self.cpu_by_process[process] = max(cpu_seconds(process), self.cpu_by_process.get(process, 0.0))


@contextmanager
def monitored(pid: int) -> Iterator[Usage]:
    """Measures a process and its descendants once per second while the block runs."""
    usage, stopped = Usage(), threading.Event()

    def monitor() -> None:
        while not stopped.wait(_INTERVAL):
            usage.update(pid)

    thread = threading.Thread(target=monitor, daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        stopped.set()
        thread.join()


def process_tree(pid: int) -> set[int]:
    """A process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(_stat_fields(stat)[1])
        except OSError:
            continue
    found, size = {pid}, 0
    while size < len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def proportional_memory(pid: int) -> int:
    """Proportional set size in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def cpu_seconds(pid: int) -> float:
    """User and system time; 0 if the process has ended."""
    try:
        user, system = _stat_fields(Path(f"/proc/{pid}/stat"))[11:13]
    except OSError:
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _stat_fields(stat: Path) -> list[str]:
    """The fields after the process name, which may contain spaces: state, parent and so on."""
    return stat.read_text().rpartition(")")[2].split()
