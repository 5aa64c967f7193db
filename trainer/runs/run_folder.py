"""Where things are in a run folder, and which checkpoint a path means.

RUN/text_encoder/                        of text_encoder=local: one for all stages
RUN/<stage>/config.json                  the resolved config that the stage was last started with
RUN/<stage>/checkpoints/step-<N>/        or HOME/<stage>/checkpoints/ with --checkpoints HOME
RUN/<stage>/metrics.jsonl, run.json ...
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.storage.shards import Store
from trainer.runs.checkpoint import Checkpoint, Checkpoints

# In training order. trainer/recipe/stages.py has a recipe for each.
STAGE_NAMES = ("demo", "256", "512", "768", "1024")
_CONFIG = "config.json"


@contextmanager
def only_job(run: Path) -> Iterator[None]:
    """Two jobs would prune each other's checkpoints: UsageError where another process is inside. The lock is the
    kernel's and of the folder itself, so that it goes with its process, however that ends. A folder that nothing was
    written to, since the job was refused, goes too."""
    is_new = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another job is training in {run}: wait for it or stop it (ray job list), or give this one a --run of "
                "its own"
            ) from error
        try:
            yield  # outside: a terminal that does not block raises BlockingIOError, too
        finally:
            if is_new and not any(run.iterdir()):
                run.rmdir()
    finally:
        os.close(folder)


def stage_folder(run: Path, stage: str) -> Path:
    return run / stage


def text_encoder_of(run: Path, name: str) -> str:
    """Where a stage's text encoder is: "local" lies in the run folder itself, so that the folder can be moved."""
    return str(run / "text_encoder") if name == "local" else name


def text_encoder_of_checkpoint(found: Checkpoint) -> str:
    """Folder or name of the text encoder that a checkpoint was trained with; "local" lies in the run folder around the
    checkpoint, and where the checkpoints have a HOME of their own in the folder that the run had."""
    config = config_of(found)
    name, around = config["stage"]["text_encoder"], found.folder.rsplit("/", 3)[0]
    if name != "local":
        return str(name)
    return f"{around if Store(around).exists('text_encoder/config.json') else config['run']}/text_encoder"


def config_of(found: Checkpoint) -> dict[str, Any]:
    """What the checkpoint's run was trained with (`Training.record`). UsageError for one that does not say so."""
    config = found.state().get("config")
    if not isinstance(config, dict):
        raise UsageError(f"{found.folder} is of another version of this program: its state.json has no config")
    return config


def read_config(run: Path, stage: str) -> dict[str, Any] | None:
    """What `write_config` wrote last; None before the first start. UsageError for a damaged file."""
    path = stage_folder(run, stage) / _CONFIG
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        if isinstance(config["stage"], dict) and isinstance(config["model"], dict):
            return dict(config)
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{path} is damaged; remove it: every checkpoint has its own copy")


def write_config(run: Path, stage: str, record: dict[str, Any]) -> None:
    Store(str(stage_folder(run, stage))).write(_CONFIG, json.dumps(record, indent=1, ensure_ascii=False).encode())


def checkpoints_of(run: str | Path, stage: str, home: str | None = None) -> str:
    """The folder of the stage's checkpoints: below `home`, else where its config says, else in the run folder."""
    if home is None and not str(run).startswith("s3://"):
        home = (read_config(Path(run), stage) or {}).get("checkpoints")
    return Checkpoints.of_stage(home or run, stage).root


def newest_by_stage(run: str | Path, home: str | None = None) -> dict[str, Checkpoint]:
    """The newest checkpoint of every stage of the run that has one, in the order of STAGE_NAMES."""
    found = {stage: Checkpoints(checkpoints_of(run, stage, home)).newest() for stage in STAGE_NAMES}
    return {stage: checkpoint for stage, checkpoint in found.items() if checkpoint is not None}


def find_checkpoint(path: str, wanted: str | None = None) -> Checkpoint | None:
    """The checkpoint that a path (also s3://) means: itself, the newest one of a stage's folder, or of a run folder:
    there the stage `wanted`, else the one that was saved last. None where there is none."""
    store = Store(path)
    if store.exists("state.json"):
        return _checkpoint(store)
    if not store.is_remote and Path(path).name in STAGE_NAMES and store.exists(_CONFIG):
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
        raise UsageError(f"{store.root} is damaged (state.json: {error}); give another checkpoint") from error
