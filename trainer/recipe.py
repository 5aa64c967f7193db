"""A command line -> one resolved training job, checked against the run folder it goes on from. Knows nothing of Ray."""

import json
import shlex
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.jobs import UsageError, local_path
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.data import CropConfig, Selection, example_texts, selection_texts
from trainer.latents import load_codec
from trainer.model.xut import XUTConfig
from trainer.stages import STAGES, StageConfig
from trainer.text import build_local_text_encoder, text_width

PRESETS = {"tiny": XUTConfig.tiny, "small": XUTConfig.small, "base": XUTConfig.base, "large": XUTConfig.large}


@dataclass(frozen=True)
class Training:
    """One training job, resolved: what every worker needs to know."""

    stage: StageConfig
    stage_name: str
    model: XUTConfig
    selection: Selection
    run: str  # absolute path of the run folder, seen by every worker
    text_encoder: str  # folder or hub name
    example_prompts: list[str]  # texts of the selection: what to ask a picture of
    workers: int
    start_step: int
    stop_step: int  # also the end of the learning rate's schedule

    def crop(self) -> CropConfig:
        return CropConfig(self.stage.resolution, self.stage.captions, self.stage.seed)

    def record(self) -> dict[str, Any]:
        """What the run trains and on what, as JSON: saved with the run and with every checkpoint."""
        selection = {"dataset": self.selection.dataset, "name": self.selection.name, "hash": self.selection.digest}
        return {
            "stage": asdict(self.stage),
            "model": self.model.to_dict(),
            "selection": selection,
            "example_prompts": self.example_prompts,
        }


def resolve(stage_name: str, dataset: str, run: str, workers: int, steps: int | None) -> Training:
    """UsageError, with the mend, for anything that the command, the dataset or the run folder make impossible."""
    stage = _stage(stage_name)
    if workers < 1 or stage.batch_size % workers:
        fitting = [n for n in range(1, stage.batch_size + 1) if stage.batch_size % n == 0]
        nearest = sorted(fitting, key=lambda n: abs(n - workers))[:2]
        raise UsageError(
            f"--workers {workers} does not divide the batch of {stage.batch_size}; nearest: {sorted(nearest)}"
        )
    total = steps if steps is not None else stage.samples // stage.batch_size
    if total < 1:
        raise UsageError(f"--steps must be at least 1: got {total}")
    selection = _selection(dataset, stage)
    folder = local_path("--run", run).resolve()
    found = Checkpoints.of_stage(folder, stage_name).newest()
    text_encoder = text_encoder_of(folder, stage.text_encoder)
    if stage.text_encoder == "local" and found is None:
        # Made anew until there is a checkpoint that was trained with it: the selection may be another one by now.
        shutil.rmtree(text_encoder, ignore_errors=True)
        build_local_text_encoder(selection_texts(selection), Path(text_encoder), stage.seed)
    try:
        text_dim = text_width(text_encoder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    channels = load_codec(stage.codec).channels
    model = PRESETS[stage.model](in_channels=channels, patch_size=stage.patch_size, text_dim=text_dim)
    training = Training(
        stage=stage,
        stage_name=stage_name,
        model=model,
        selection=selection,
        run=str(folder),
        text_encoder=text_encoder,
        example_prompts=example_texts(selection, 6),
        workers=workers,
        start_step=found.step if found else 0,
        stop_step=total,
    )
    _check_same_run(found, training)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(training.record(), indent=1))
    return training


def _stage(name: str) -> StageConfig:
    if name not in STAGES:
        raise UsageError(f"there is no stage {name!r} yet; stages: {', '.join(STAGES)}")
    return STAGES[name]


def _selection(dataset: str, stage: StageConfig) -> Selection:
    try:
        selection = Selection.load(dataset, stage.selection)
    except FileNotFoundError:
        mend = f"run: python pipeline/curate.py --dataset {shlex.quote(dataset)} --stage {stage.selection}"
        raise UsageError(f"{dataset} has no selection {stage.selection!r}; {mend}") from None
    if selection.count < 1:
        raise UsageError(f"the selection {stage.selection!r} of {dataset} is empty")
    return selection


def text_encoder_of(run: str | Path, name: str) -> str:
    """Where a stage's text encoder is: "local" lies in the run folder itself, so that the folder can be moved."""
    return f"{run}/text_encoder" if name == "local" else name


# Of a stage, when a run goes on: what decides neither a step's result nor its place in the data.
_MAY_CHANGE = {"samples", "log_every", "checkpoint_every"}


def _check_same_run(found: Checkpoint | None, training: Training) -> None:
    """A run goes on only with the model, the stage and the selection that it began with: a step's position in the data
    follows from the batch size, an optimizer's state from its kind."""
    if found is None:
        return
    before, now = found.state()["config"], json.loads(json.dumps(training.record()))
    changed = [f"model.{name}" for name, value in now["model"].items() if before["model"].get(name) != value]
    fixed = now["stage"].keys() - _MAY_CHANGE
    changed += sorted(f"stage.{name}" for name in fixed if before["stage"].get(name) != now["stage"][name])
    if before["selection"]["hash"] != now["selection"]["hash"]:
        changed.append("selection (curated anew since)")
    if changed:
        raise UsageError(
            f"{training.run} was begun with other settings: {', '.join(changed)}; give another --run folder"
        )
