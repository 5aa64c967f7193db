"""Model, EMA and optimizer in safetensors plus one JSON, here or on S3; a checkpoint appears whole or not at all.

RUN/STAGE/checkpoints/step-00001500/{model,ema,optimizer}.safetensors, state.json

state.json lists the other files with their sizes. Locally the folder is written under another name, flushed and
renamed; on S3 state.json is written last and removed first. What a killed process leaves is never taken for a
checkpoint, and the next save removes it.
"""

import copy
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.storage.run_record import versions
from pipeline.storage.shards import Store

Tensors = Mapping[str, Mapping[str, Tensor]]  # by file (model, ema, optimizer), then by name
State = dict[str, Any]

_STATE = "state.json"
# A step that is saved again gets a name of its own: there is no moment without a checkpoint of it.
_NAME = re.compile(r"step-(\d{8,})(-\d+)?")
# As safetensors calls them.
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
    """One finished checkpoint."""

    folder: str  # a path here or s3://bucket/prefix
    step: int  # optimizer steps taken
    saved_at: float  # unix seconds; of a stage's checkpoints each is later than those before, whatever the clocks say

    def state(self) -> State:
        """What is no tensor: see `training_state`; with step, saved_at, and files, the bytes of each."""
        state: State = json.loads(Store(self.folder).read(_STATE))
        return state

    def tensors(self, name: str) -> dict[str, Tensor]:
        """`name` is model, ema or optimizer. ValueError, with the mend, for a damaged or missing file."""
        file = f"{name}.safetensors"
        try:
            with Store(self.folder).local_copy(file) as path:
                tensors: dict[str, Tensor] = load_file(path)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(
                f"{self.folder}/{file} is damaged ({error}); remove {self.folder} to use the checkpoint before"
            ) from error
        return tensors


@dataclass(frozen=True)
class Checkpoints:
    """Those of one stage of a run, below `root`, a path here or s3://bucket/prefix. One process at a time saves."""

    root: str

    @classmethod
    def of_stage(cls, run: str | Path, stage_name: str) -> "Checkpoints":
        return cls(f"{str(run).rstrip('/')}/{stage_name}/checkpoints")

    def finished(self) -> list[Checkpoint]:
        """All whole ones: state.json can be read, and each file that it lists has its size. In the order in which they
        were saved, which is not that of the steps where training went back to an older one."""
        store = Store(self.root)
        sizes = store.sizes()
        found = []
        for name in {file.partition("/")[0] for file in sizes if file.endswith(f"/{_STATE}")}:
            step, state = _step(name), _read_state(store, name)
            if step is not None and state is not None and _all_there(state, name, sizes):
                found.append(Checkpoint(store.path(name), step, state["saved_at"]))
        return sorted(found, key=lambda checkpoint: (checkpoint.saved_at, checkpoint.step))

    def newest(self) -> Checkpoint | None:
        """The whole one that was saved last, or None."""
        return next(reversed(self.finished()), None)

    def save(self, step: int, tensors: Tensors, state: State, keep_last: int = 2, keep_every: int = 0) -> Checkpoint:
        """Write a checkpoint, and only then remove the others but the `keep_last` newest, of which it is one, and those
        whose step is a multiple of `keep_every`, if that is above 0.

        Where it cannot be written, the error (OSError, or one of `Store`'s) is raised when what there is of it has been
        removed; the older ones stay.
        """
        if keep_last < 1 or keep_every < 0:
            raise ValueError(f"keep_last {keep_last} must be at least 1, keep_every {keep_every} at least 0")
        store = Store(self.root)
        _remove_leftovers(store)
        before = self.finished()
        superseded = [name for name in store.folders("") if _step(name) == step]
        name = _free_name(step, superseded)
        saved_at = max(time.time(), before[-1].saved_at + 0.001) if before else time.time()
        state = state | {"step": step, "saved_at": saved_at}
        (_write_remote if store.is_remote else _write_local)(store, name, tensors, state)
        saved = Checkpoint(store.path(name), step, saved_at)
        others = [checkpoint for checkpoint in before if checkpoint.step != step]
        outdated = [_name(checkpoint) for checkpoint in _outdated([*others, saved], keep_last, keep_every)]
        for old in superseded + outdated:
            _remove(store, old)
        return saved


class Saver:
    """Saves beside the training: a copy is made at once, and written by a thread while training goes on.

    A failed save (a full disk, S3 out of reach) is added to `failures` and changes nothing else.
    """

    def __init__(self, checkpoints: Checkpoints, keep_last: int = 2, keep_every: int = 0) -> None:
        self.failures: list[str] = []  # one line for each
        self._checkpoints = checkpoints
        self._keep = {"keep_last": keep_last, "keep_every": keep_every}
        self._thread: threading.Thread | None = None

    def submit(self, step: int, tensors: Tensors, state: State) -> None:
        """Returns when the tensors have been copied to host memory: they may change then. Waits for a save that is
        under way, so that there is never more than one copy."""
        self.wait()
        try:
            # A CUDA tensor's copy waits for the work that was queued before.
            copies = {
                file: {
                    name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                    for name, tensor in named.items()
                }
                for file, named in tensors.items()
            }
        except (MemoryError, RuntimeError) as error:  # torch's for memory is a RuntimeError
            self._failed(step, error)
            return
        self._thread = threading.Thread(target=self._save, args=(step, copies, copy.deepcopy(state)), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being saved."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _save(self, step: int, tensors: Tensors, state: State) -> None:
        try:
            self._checkpoints.save(step, tensors, state, **self._keep)
        except Exception as error:
            self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> None:
        why = " ".join(str(error).split()) or type(error).__name__
        self.failures.append(f"the checkpoint of step {step} could not be saved in {self._checkpoints.root}: {why}")


# --- Files ------------------------------------------------------------------------------------------------------------


def _step(name: str) -> int | None:
    """None for what is no checkpoint's name."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.folder.rpartition("/")[2]


def _free_name(step: int, taken: Collection[str]) -> str:
    plain = f"step-{step:08d}"
    return next(name for name in (plain, *(f"{plain}-{n}" for n in range(2, len(taken) + 3))) if name not in taken)


def _read_state(store: Store, name: str) -> State | None:
    """None for one that cannot be read, or is cut short."""
    try:
        state = json.loads(store.read(f"{name}/{_STATE}"))
    except (OSError, ValueError):
        return None
    ours = isinstance(state, dict) and isinstance(state.get("files"), dict)
    return state if ours and isinstance(state.get("saved_at"), int | float) else None


def _all_there(state: State, name: str, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(f"{name}/{file}") == size for file, size in state["files"].items())


def _outdated(oldest_first: list[Checkpoint], keep_last: int, keep_every: int) -> list[Checkpoint]:
    return [c for c in oldest_first[:-keep_last] if not keep_every or c.step % keep_every]


def _write_local(store: Store, name: str, tensors: Tensors, state: State) -> None:
    root = Path(store.root)
    partial = root / f".{name}.partial"
    _make_folder(partial)
    try:
        _write_files(lambda file: nullcontext(str(partial / file)), tensors, state)
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        partial.rename(root / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(root)


def _write_remote(store: Store, name: str, tensors: Tensors, state: State) -> None:
    try:
        _write_files(lambda file: store.committed(f"{name}/{file}"), tensors, state)
    except BaseException:
        with suppress(Exception):  # S3 may be out of reach: the next save removes it
            _remove(store, name)
        raise


def _write_files(place: Callable[[str], AbstractContextManager[str]], tensors: Tensors, state: State) -> None:
    """`place` gives the local path at which a file is to be written."""
    files = {}
    for kind, named in tensors.items():
        with place(f"{kind}.safetensors") as path:
            files[f"{kind}.safetensors"] = write_tensors(path, named)
    with place(_STATE) as path:
        Path(path).write_text(json.dumps(state | {"files": files}, indent=1))


def write_tensors(path: str, tensors: Mapping[str, Tensor]) -> int:
    """Write a safetensors file (huggingface.co/docs/safetensors, "Format") and return its bytes. ValueError for a dtype
    that the format does not have.

    The library's own function writes beside `path` and renames, out of reach of the lock of `Store.committed`: a killed
    process would leave gigabytes in TMPDIR for good.
    """
    unknown = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype not in _DTYPES}
    if unknown:
        raise ValueError(f"tensors of these types cannot be saved: {unknown}")
    # Wide types first: each tensor then starts at a multiple of its element's size.
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
    """Of saves and removals that were killed."""
    if store.is_remote:
        sizes = store.sizes()
        for name in {file.partition("/")[0] for file in sizes}:
            if _step(name) is not None and f"{name}/{_STATE}" not in sizes:
                _remove(store, name)
        return
    for folder in Path(store.root).glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _remove(store: Store, name: str) -> None:
    """At once or, on S3, as a checkpoint at once: what may be left, when this is killed, is no checkpoint."""
    if store.is_remote:
        for file in sorted(store.sizes(name), key=lambda file: file != _STATE):
            store.remove(f"{name}/{file}")
        return
    hidden = Path(store.path(f".{name}.removed"))
    Path(store.path(name)).rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    """With its parents; a new folder's name is on the disk when this returns."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """A file's content, or the names in a folder, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network file systems
            raise
    finally:
        os.close(opened)


# --- What is saved ----------------------------------------------------------------------------------------------------


def training_state(
    *,
    stage_name: str,
    epoch: int,
    position: int,
    first_epoch: int,
    seed: int,
    config: Mapping[str, Any],
    selection: str,
) -> State:
    """What a checkpoint's state.json has beside step, saved_at and files, which `save` adds.

    epoch, position: where in the order of samples training goes on; position counts samples since the start of
    training. first_epoch: the one that the present selection's order began with. config: the whole resolved one, as
    JSON has it. selection: its hash.
    """
    return {
        "stage_name": stage_name,
        "epoch": epoch,
        "position": position,
        "first_epoch": first_epoch,
        "seed": seed,
        "config": dict(config),
        "config_hash": config_hash(config),
        "selection": selection,
        "versions": versions(),
        "git_revision": git_revision(),
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of a config's JSON; the order of its names does not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def git_revision() -> str | None:
    """The commit of this code's checkout when the process first asked; None outside of one, or without git."""
    return _revision(Path(__file__).parents[2])


def _revision(checkout: Path) -> str | None:
    """None, too, for a folder that lies in another project's checkout."""
    command = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    top, revision = answer.split("\n")[:2]
    return revision if Path(top).resolve() == checkout.resolve() else None
