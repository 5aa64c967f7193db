"""What every worker is doing when a run has stalled: stacks of its threads, and its collective operations.

The driver makes the folder STAGE/stalls/<UTC time>. A thread of each worker finds it and writes `rank-<N>.txt`, by
faulthandler, and what torch.distributed has recorded of the newest collective operations: `nccl-<N>`, which
`python -m torch.distributed.flight_recorder.fr_trace --prefix nccl- FOLDER` compares, and `gloo-<N>.json`. A request by
a folder reaches workers whose main thread hangs, and depends on no other process.
"""

import faulthandler
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

STALLS: Final = "stalls"  # folder in that of a stage

_POLL_SECONDS: Final = 2.0
_RECORDED: Final = 2000  # collective operations, the newest
# As in the alert HdmTrainingNoProgress.
_LEAST_IDLE, _TIMES_LONGEST = 600.0, 2.0


def has_stalled(idle_seconds: float, longest_idle_seconds: float) -> bool:
    """True if no step was logged for 10 minutes and for twice the longest time before (see StallDetector)."""
    return idle_seconds > _LEAST_IDLE and idle_seconds > _TIMES_LONGEST * longest_idle_seconds


def request_stacks(stage_folder: str) -> Path:
    """Makes the folder that the workers write to. OSError if it cannot be made."""
    folder = Path(stage_folder) / STALLS / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def recorder_environment(stage_folder: str) -> dict[str, str]:
    """Environment variables that make torch.distributed record, to be set before a process group is made.

    If a collective of NCCL times out, torch itself writes STAGE/nccl-timeout-<N> before it ends the worker.
    """
    # torch 2.13 has renamed TORCH_NCCL_TRACE_BUFFER_SIZE and TORCH_NCCL_DEBUG_INFO_TEMP_FILE, which is still read.
    file = f"{stage_folder}/nccl-timeout-"
    return {
        "TORCH_FR_BUFFER_SIZE": str(_RECORDED),
        "TORCH_FR_DUMP_TEMP_FILE": file,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": file,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


class StackWriter:
    """A thread of a worker that waits for requests. `close` ends it."""

    def __init__(self, stage_folder: str, rank: int) -> None:
        self._folder, self._rank = Path(stage_folder) / STALLS, rank
        self._seen = self._requests()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="stacks").start()

    def close(self) -> None:
        self._closed.set()

    def _requests(self) -> set[str]:
        with suppress(OSError):
            return set(os.listdir(self._folder))
        return set()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            for name in sorted(self._requests() - self._seen):
                self._seen.add(name)
                try:
                    write_stacks(self._folder / name, self._rank)
                except (OSError, RuntimeError) as error:  # RuntimeError: of torch's recorder
                    logging.getLogger(__name__).warning("no stacks of rank %d: %s", self._rank, error)


def write_stacks(folder: Path, rank: int) -> None:
    """Writes the stacks of all threads of this process, then its collective operations if there are any."""
    with (folder / f"rank-{rank}.txt").open("w") as file:
        print(f"rank {rank}, process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)
    for name, recorded in _collectives().items():
        (folder / name.format(rank)).write_bytes(recorded)


def _collectives() -> dict[str, bytes]:
    """File names, with a place for the rank, and contents. {} without a process group."""
    import torch.distributed

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    from torch._C import _distributed_c10d

    # The first is missing where torch was built without CUDA.
    dumps = {"nccl-{}": "_dump_nccl_trace", "gloo-{}.json": "_dump_fr_trace_json"}
    return {
        name: getattr(_distributed_c10d, dump)() for name, dump in dumps.items() if hasattr(_distributed_c10d, dump)
    }
