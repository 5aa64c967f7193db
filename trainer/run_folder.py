"""Where things are in a run folder, and which checkpoint a path means.

RUN/text_encoder/                        of text_encoder=local: one for all stages
RUN/<stage>/config.json                  the resolved config that the stage was last started with
RUN/<stage>/checkpoints/step-<N>/        or HOME/<stage>/checkpoints/ with --checkpoints HOME
RUN/<stage>/metrics.jsonl, run.json ...
"""

import json
from pathlib import Path
from typing import Any

from pipeline.jobs import UsageError, local_path
from pipeline.shards import Store
from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.stages import STAGES

_CONFIG = "config.json"


def stage_folder(run: Path, stage: str) -> Path:
    return run / stage


def text_encoder_of(run: Path, name: str) -> str:
    """Where a stage's text encoder is: "local" lies in the run folder itself, so that the folder can be moved."""
    return str(run / "text_encoder") if name == "local" else name


def text_encoder_of_checkpoint(found: Checkpoint) -> str:
    """Folder or name of the text encoder that a checkpoint was trained with; "local" lies in the run folder around the
    checkpoint, and where the checkpoints have a HOME of their own in the folder that the run had."""
    config = config_of(found)
    name, around = config["stage"]["text_encoder"], found.folder.parents[2]
    return text_encoder_of(around if Path(text_encoder_of(around, name)).is_dir() else Path(config["run"]), name)


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


def checkpoints_of(run: Path, stage: str, home: str | None = None) -> str:
    """The folder of the stage's checkpoints: below `home`, else where its config says, else in the run folder."""
    home = home or (read_config(run, stage) or {}).get("checkpoints") or str(run)
    return f"{home.rstrip('/')}/{stage}/checkpoints"


def newest(checkpoints: str) -> Checkpoint | None:
    """The newest finished checkpoint in a folder of checkpoints, or None."""
    return checkpoint.newest(local_path("--checkpoints", checkpoints).parent)


def newest_by_stage(run: Path, home: str | None = None) -> dict[str, Checkpoint]:
    """The newest checkpoint of every stage of the run that has one, in the order of STAGES."""
    found = {stage: newest(checkpoints_of(run, stage, home)) for stage in STAGES}
    return {stage: checkpoint for stage, checkpoint in found.items() if checkpoint is not None}


def find_checkpoint(path: Path, wanted: str | None = None) -> Checkpoint | None:
    """The checkpoint that a path means: itself, the newest one of a stage's folder, or of a run folder: there the stage
    `wanted`, else the last stage that has one. None where there is none."""
    if (path / "state.json").is_file():
        return Checkpoint(path, _step(path))
    if (path / "checkpoints").is_dir():
        return newest(str(path / "checkpoints"))
    if path.name in STAGES and (path / _CONFIG).is_file():
        return newest(checkpoints_of(path.parent, path.name))
    by_stage = newest_by_stage(path)
    if wanted in by_stage:
        return by_stage[wanted]
    return list(by_stage.values())[-1] if by_stage else None


def _step(folder: Path) -> int:
    try:
        return int(json.loads((folder / "state.json").read_text())["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} is damaged (state.json: {error}); give another checkpoint") from error
