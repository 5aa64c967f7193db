"""Saves and finds checkpoints, on the local disk or S3. A checkpoint appears whole or not at all.

RUN/STAGE/checkpoints/step-00001500/{model,ema,optimizer,power_ema}.safetensors, state.json

state.json lists the other files with their sizes. Locally the folder is written under a temporary name, flushed to disk
and renamed; on S3 state.json is written last and removed first. So whatever a killed process leaves behind is not
mistaken for a checkpoint, and the next save removes it.
"""

import copy
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.storage.reachability import is_network_error
from pipeline.storage.shards import Store

Tensors = Mapping[str, Mapping[str, Tensor]]  # by file (model, ema, optimizer, power_ema), then by name
State = dict[str, Any]
# Yields a local path for the name of a file, which is complete when the block ends.
_Place = Callable[[str], AbstractContextManager[str]]

_STATE = "state.json"
_COPY_BYTES = 16 << 20
# The suffix is for a step that is saved again: its old checkpoint stays until the new one is complete.
_NAME = re.compile(r"step-(\d{8,})(-\d+)?")
# Names of the dtypes in the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint."""

    folder: str  # a local path or s3://bucket/prefix
    step: int  # optimizer steps taken
    saved_at: float  # unix seconds; later than those of all earlier checkpoints of the stage, whatever the clock says

    def state(self) -> State:
        """The content of state.json: see `training_state`, plus step, saved_at and files (bytes by name)."""
        state: State = json.loads(Store(self.folder).read(_STATE))
        return state

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors by name of one of the files, such as "ema". Raises ValueError if it is damaged or missing."""
        file = f"{name}.safetensors"
        try:
            with Store(self.folder).local_copy(file) as path:
                tensors: dict[str, Tensor] = load_file(path)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(
                f"{self.folder}/{file} is damaged ({error}). Remove {self.folder} to use the checkpoint before it"
            ) from error
        return tensors


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage of a run. Only one process may save at a time."""

    root: str  # a local path or s3://bucket/prefix

    @classmethod
    def of_stage(cls, run: str | Path, stage_name: str) -> "Checkpoints":
        return cls(f"{str(run).rstrip('/')}/{stage_name}/checkpoints")

    def finished(self) -> list[Checkpoint]:
        """All complete checkpoints: state.json is readable, and every file that it lists has the listed size.

        Oldest first by the time of saving, which differs from the order of steps after training was rolled back.
        """
        store = Store(self.root)
        sizes = store.sizes()
        found = []
        for name in {file.partition("/")[0] for file in sizes if file.endswith(f"/{_STATE}")}:
            step, state = _step(name), _read_state(store, name)
            if step is not None and state and all(sizes.get(f"{name}/{f}") == n for f, n in state["files"].items()):
                found.append(Checkpoint(store.path(name), step, state["saved_at"]))
        return sorted(found, key=lambda checkpoint: (checkpoint.saved_at, checkpoint.step))

    def newest(self) -> Checkpoint | None:
        """The complete checkpoint that was saved last, or None."""
        return next(reversed(self.finished()), None)

    def save(self, step: int, tensors: Tensors, state: State, keep_last: int = 2, keep_every: int = 0) -> Checkpoint:
        """Writes a checkpoint, then removes older ones.

        Kept are the `keep_last` newest, including this one, and those whose step is a multiple of `keep_every` if that
        is above 0. If writing fails, what was written is removed, older checkpoints stay, and the error (OSError or one
        of `Store`'s) is raised.
        """
        before = self.finished()
        saved_at = max(time.time(), before[-1].saved_at + 0.001) if before else time.time()
        state = state | {"step": step, "saved_at": saved_at}
        return self._add(
            before, step, saved_at, lambda place: _write_files(place, tensors, state), keep_last, keep_every
        )

    def copy(self, source: Checkpoint, keep_last: int = 2, keep_every: int = 0) -> Checkpoint:
        """Adds an equal checkpoint, then removes older ones like `save`. Each file is read back and compared; S3 itself
        compares the checksums of what it gets.

        Does nothing if a checkpoint here was saved at the same time or later, and returns the newest. If copying fails,
        what was written is removed, and OSError or one of `Store`'s errors is raised.
        """
        before = self.finished()
        if before and before[-1].saved_at >= source.saved_at:
            return before[-1]
        copied = self._add(
            before, source.step, source.saved_at, lambda place: _copy_files(place, source.folder), keep_last, keep_every
        )
        if copied not in self.finished():
            raise OSError(errno.EIO, "the copy is incomplete", copied.folder)
        return copied

    def _add(
        self,
        before: list[Checkpoint],
        step: int,
        saved_at: float,
        write: Callable[[_Place], None],
        keep_last: int,
        keep_every: int,
    ) -> Checkpoint:
        """Adds the files of `write` as a checkpoint to those before, and removes older ones."""
        if keep_last < 1 or keep_every < 0:
            raise ValueError(f"keep_last {keep_last} must be at least 1, keep_every {keep_every} at least 0")
        store = Store(self.root)
        _remove_leftovers(store)
        superseded = [name for name in store.folders("") if _step(name) == step]
        name = _free_name(step, superseded)
        (_write_remote if store.is_remote else _write_local)(store, name, write)
        saved = Checkpoint(store.path(name), step, saved_at)
        older = [checkpoint for checkpoint in before if checkpoint.step != step]
        outdated = [c for c in [*older, saved][:-keep_last] if not keep_every or c.step % keep_every]
        for old in superseded + [checkpoint.folder.rpartition("/")[2] for checkpoint in outdated]:
            _remove(store, old)
        return saved


class Saver:
    """Saves checkpoints in the background: copies the tensors at once and writes them in a thread.

    A save that fails, because of a full disk or unreachable S3, adds a line to `failures` and has no other effect.
    """

    def __init__(self, checkpoints: Checkpoints, keep_last: int = 2, keep_every: int = 0) -> None:
        self.then: Callable[[Checkpoint], object] = lambda saved: None  # called with each checkpoint, in the thread
        self.failures: list[str] = []  # one line per failed save
        self._checkpoints = checkpoints
        self._keep = {"keep_last": keep_last, "keep_every": keep_every}
        self._thread: threading.Thread | None = None

    def submit(self, step: int, tensors: Tensors, state: State) -> None:
        """Returns once the tensors are copied to host memory, so training may change them.

        Waits for a save in progress first: there is never more than one copy.
        """
        state = copy.deepcopy(state)

        def save(copies: Tensors) -> None:
            self.then(self._checkpoints.save(step, copies, state, **self._keep))

        self._submit(step, tensors, None, save)

    def submit_snapshot(
        self, step: int, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], None]
    ) -> None:
        """The same for averages, which `write` gets in float16."""
        self._submit(step, {"": tensors}, torch.float16, lambda copies: write(copies[""]))

    def _submit(
        self, step: int, tensors: Tensors, dtype: torch.dtype | None, write: Callable[[Tensors], object]
    ) -> None:
        self.wait()
        try:
            # Copying a CUDA tensor waits for the work that was queued before.
            copies = {
                file: {
                    name: tensor.detach().to(
                        "cpu",
                        dtype if tensor.is_floating_point() else None,
                        copy=True,
                        memory_format=torch.contiguous_format,
                    )
                    for name, tensor in named.items()
                }
                for file, named in tensors.items()
            }
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError when it cannot allocate
            self._failed(step, error)
            return
        self._thread = threading.Thread(target=self._write, args=(step, copies, write), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when no save is in progress."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, copies: Tensors, write: Callable[[Tensors], object]) -> None:
        try:
            write(copies)
        except Exception as error:
            self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        self.failures.append(f"the checkpoint of step {step} could not be saved in {self._checkpoints.root}: {reason}")


# --- Files ------------------------------------------------------------------------------------------------------------


def _step(name: str) -> int | None:
    """The step in a checkpoint's folder name; None for any other name."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def _free_name(step: int, taken: Collection[str]) -> str:
    plain = f"step-{step:08d}"
    numbered = (f"{plain}-{n}" for n in itertools.count(2))
    return next(name for name in itertools.chain([plain], numbered) if name not in taken)


def _read_state(store: Store, name: str) -> State | None:
    """None if state.json is unreadable, truncated or something else. OSError if its folder cannot be reached."""
    try:
        state = json.loads(store.read(f"{name}/{_STATE}"))
    except (OSError, ValueError) as error:
        if is_network_error(error):
            raise
        return None
    ours = isinstance(state, dict) and isinstance(state.get("files"), dict)
    return state if ours and isinstance(state.get("saved_at"), int | float) else None


def _write_local(store: Store, name: str, write: Callable[[_Place], None]) -> None:
    root = Path(store.root)
    partial = root / f".{name}.partial"
    _make_folder(partial)
    try:
        write(lambda file: nullcontext(str(partial / file)))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(root / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(root)


def _write_remote(store: Store, name: str, write: Callable[[_Place], None]) -> None:
    try:
        write(lambda file: store.committed(f"{name}/{file}"))
    except BaseException:
        with suppress(Exception):  # if S3 is unreachable, the next save removes it
            _remove(store, name)
        raise


def _write_files(place: _Place, tensors: Tensors, state: State) -> None:
    """state.json comes last."""
    files = {}
    for kind, named in tensors.items():
        with place(f"{kind}.safetensors") as path:
            files[f"{kind}.safetensors"] = write_tensors(path, named)
    with place(_STATE) as path:
        Path(path).write_text(json.dumps(state | {"files": files}, indent=1))


def _copy_files(place: _Place, folder: str) -> None:
    """state.json comes last. Raises the errors of `copy_file`."""
    source = Store(folder)
    for name in (*json.loads(source.read(_STATE))["files"], _STATE):
        with place(name) as path:
            copy_file(source, name, path)


def copy_file(source: Store, name: str, path: str) -> None:
    """Writes a file of `source` to a local path. OSError if what was written differs from what was read."""
    with source.open(name) as original, open(path, "wb") as copy:
        digest = _copy_stream(original, copy)
    with open(path, "rb") as copy:
        if hashlib.file_digest(copy, "sha256").digest() != digest:
            raise OSError(errno.EIO, "what was written differs when it is read back", path)


def _copy_stream(original: BinaryIO, copy: BinaryIO) -> bytes:
    """The SHA-256 of what was copied. The copy is on the disk then, and no longer in memory."""
    digest = hashlib.sha256()
    while piece := original.read(_COPY_BYTES):
        digest.update(piece)
        copy.write(piece)
    copy.flush()
    os.fsync(copy.fileno())
    os.posix_fadvise(copy.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.digest()


def write_tensors(path: str, tensors: Mapping[str, Tensor]) -> int:
    """Writes a safetensors file (huggingface.co/docs/safetensors, "Format") and returns its size in bytes.

    Raises ValueError for a dtype that the format does not have. The library's own function writes to another path and
    renames, which escapes the lock of `Store.committed`: a killed process would leave gigabytes in TMPDIR for good.
    """
    unknown = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype not in _DTYPES}
    if unknown:
        raise ValueError(f"tensors of these dtypes cannot be saved: {unknown}")
    # Wide dtypes first, so that each tensor starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return file.tell()


def _remove_leftovers(store: Store) -> None:
    """Removes what killed saves and removals left behind."""
    if store.is_remote:
        sizes = store.sizes()
        for name in {file.partition("/")[0] for file in sizes}:
            if _step(name) is not None and f"{name}/{_STATE}" not in sizes:
                _remove(store, name)
        return
    for folder in Path(store.root).glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _remove(store: Store, name: str) -> None:
    """Removes a checkpoint. If the process is killed meanwhile, what is left is not taken for a checkpoint."""
    if store.is_remote:
        for file in sorted(store.sizes(name), key=lambda file: file != _STATE):
            store.remove(f"{name}/{file}")
        return
    hidden = Path(store.path(f".{name}.removed"))
    Path(store.path(name)).rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    """Creates a folder and its parents, and flushes each new name to disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Flushes a file's content, or the names in a folder, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # as on some network file systems
            raise
    finally:
        os.close(opened)
