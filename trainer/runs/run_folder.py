"""The layout of a run folder, and the checkpoint that a path refers to.

RUN/text_encoder/                        with text_encoder=local: one encoder for all stages
RUN/<stage>/config.json                  the resolved config of the stage's last start
RUN/<stage>/checkpoints/step-<N>/        or HOME/<stage>/checkpoints/ with --checkpoints HOME
RUN/<stage>/metrics.jsonl, run.json ...

A decay from a checkpoint of a stage (run.py --anneal) has a folder like a stage's, see `anneal_name`.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.storage.shards import Store
from trainer.runs.checkpoint import Checkpoint, Checkpoints

# In training order. Each has a recipe in trainer/recipe/stages.py.
STAGE_NAMES = ("demo", "256", "512", "768", "1024")
_CONFIG = "config.json"
_ANNEAL = re.compile(rf"({'|'.join(STAGE_NAMES)})-anneal-\d+-\d+")


def anneal_name(stage: str, start_step: int, steps: int) -> str:
    """Folder of a decay of `steps` steps from the checkpoint of `start_step`. The same command finds it again."""
    return f"{stage}-anneal-{start_step}-{steps}"


def stage_of(folder: str) -> str | None:
    """The stage that a folder's name belongs to, also of an anneal; None for any other name."""
    anneal = _ANNEAL.fullmatch(folder)
    return anneal[1] if anneal else folder if folder in STAGE_NAMES else None


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Holds an exclusive lock on a run folder. Raises UsageError if another process holds it.

    Two jobs would prune each other's checkpoints. The lock is the kernel's, on the folder itself, so it ends with the
    process. A folder that this creates is removed again if nothing was written to it.
    """
    is_new = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another job is training in {run}. Wait for it, stop it (ray job list), or give this job another --run"
            ) from error
        try:
            yield  # outside the first try: writing to a non-blocking terminal raises BlockingIOError too
        finally:
            if is_new and not any(run.iterdir()):
                run.rmdir()
    finally:
        os.close(folder)


def text_encoder_of(run: Path, name: str) -> str:
    """Folder or hub name of a stage's text encoder. "local" lies inside the run folder, which can be moved."""
    return str(run / "text_encoder") if name == "local" else name


def text_encoder_of_checkpoint(found: Checkpoint) -> str:
    """Folder or hub name of the text encoder that a checkpoint was trained with.

    "local" lies in the run folder that contains the checkpoint or, if checkpoints were kept in another HOME, in the
    recorded run folder.
    """
    config = config_of(found)
    name, parent = config["stage"]["text_encoder"], found.folder.rsplit("/", 3)[0]
    if name != "local":
        return str(name)
    return f"{parent if Store(parent).exists('text_encoder/config.json') else config['run']}/text_encoder"


def config_of(found: Checkpoint) -> dict[str, Any]:
    """The config that a checkpoint was trained with (`Training.record`). Raises UsageError if it has none."""
    config = found.state().get("config")
    if not isinstance(config, dict):
        raise UsageError(f"{found.folder} was saved by another version of this program: its state.json has no config")
    return config


def read_config(run: Path, stage: str) -> dict[str, Any] | None:
    """The config that `write_config` wrote last; None before the first start. Raises UsageError if it is damaged."""
    path = run / stage / _CONFIG
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        if isinstance(config["stage"], dict) and isinstance(config["model"], dict):
            return dict(config)
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{path} is damaged. Remove it: every checkpoint has its own copy")


def write_config(run: Path, stage: str, record: dict[str, Any]) -> None:
    Store(str(run / stage)).write(_CONFIG, json.dumps(record, indent=1, ensure_ascii=False).encode())


def checkpoints_of(run: str | Path, stage: str, home: str | None = None) -> str:
    """The folder of a stage's checkpoints: in `home` if given, else where its config says, else in the run folder."""
    if home is None and not str(run).startswith("s3://"):
        home = (read_config(Path(run), stage) or {}).get("checkpoints")
    return Checkpoints.of_stage(home or run, stage).root


def newest_by_stage(run: str | Path, home: str | None = None) -> dict[str, Checkpoint]:
    """The newest checkpoint of each stage that has one, in the order of STAGE_NAMES, then of each anneal."""
    anneals = [name for name in Store(str(run)).folders("") if _ANNEAL.fullmatch(name)]
    found = {name: Checkpoints(checkpoints_of(run, name, home)).newest() for name in (*STAGE_NAMES, *anneals)}
    return {stage: checkpoint for stage, checkpoint in found.items() if checkpoint is not None}


def find_checkpoint(path: str, wanted: str | None = None) -> Checkpoint | None:
    """The checkpoint that a local or s3:// path refers to, or None.

    That is the path itself, or the newest checkpoint of a stage folder or of a run folder. In a run folder the stage
    `wanted` comes first, then whichever checkpoint was saved last.
    """
    store = Store(path)
    if store.exists("state.json"):
        return _checkpoint(store)
    if not store.is_remote and stage_of(Path(path).name) and store.exists(_CONFIG):
        return Checkpoints(checkpoints_of(Path(path).parent, Path(path).name)).newest()
    if "checkpoints" in store.folders(""):
        return Checkpoints(store.path("checkpoints")).newest()
    by_stage = newest_by_stage(store.root)
    if wanted in by_stage:
        return by_stage[wanted]
    return max(by_stage.values(), key=lambda checkpoint: checkpoint.saved_at, default=None)


def _checkpoint(store: Store) -> Checkpoint:
    try:
        state = json.loads(store.read("state.json"))
        return Checkpoint(store.root, int(state["step"]), float(state["saved_at"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{store.root} is damaged (state.json: {error}). Give another checkpoint") from error
