"""A command line -> one resolved training job, checked against the dataset and the run folder. Imports no Ray."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.core.jobs import local_path
from trainer.encoders.load_codec import codec_shape
from trainer.encoders.text import text_width
from trainer.encoders.vision import vision_shape
from trainer.model.config import XUTConfig
from trainer.model.float8 import check_installed
from trainer.optimization.schedule import Anneal, Schedule, change_of_length
from trainer.recipe import changes, overrides
from trainer.recipe.changes import Changes, affecting
from trainer.recipe.command import Command
from trainer.recipe.initial_weights import (
    checkpoints_before,
    find_adapter_base,
    find_initial_checkpoint,
    refuse_initial,
)
from trainer.recipe.local_text_encoder import prepare_text_encoder
from trainer.recipe.stage_config import PRESETS, check_grid, dividing_counts, micro_batch, stage_config, total_steps
from trainer.recipe.stages import StageConfig
from trainer.recipe.training import Training
from trainer.runs import run_folder
from trainer.runs.checkpoint import Checkpoint, Checkpoints
from trainer.runs.checkpoint_copy import restore
from trainer.samples.data import example_texts
from trainer.samples.row_index import Selection


def resolve(command: Command) -> Training:
    """The job to run. Writes its config to the stage's folder and the text encoder "local" to the run folder.

    UsageError if the flags contradict each other, the dataset or the run folder.
    """
    run = local_path("--run", command.run).resolve()
    if run.is_file():
        raise UsageError(f"--run {run} is a file; give a folder, which is created if it does not exist")
    home = _checkpoint_home(command, run)
    restored = []
    if command.anneal is not None and command.start_from is None:
        restored += _restored(command, run, command.stage, run_folder.checkpoints_of(run, command.stage, home))
    branch = _branch(command, run, home)
    name = run_folder.anneal_name(command.stage, branch.step, command.anneal or 0) if branch else command.stage
    checkpoints = run_folder.checkpoints_of(run, name, home)
    restored += _restored(command, run, name, checkpoints)
    newest = Checkpoints(checkpoints).newest() or branch
    with _value_errors_are_usage_errors():
        base = None if branch else command.start_from
        adapters = None if command.lora is None else find_adapter_base(command.lora, base, newest)
    stage, model_fields, notes = stage_config(
        command.stage, overrides.parse(command.settings), adapters.stage_fields() if adapters else None
    )
    _check_optional_parts(stage, with_adapters=adapters is not None)
    total = branch.step + (command.anneal or 0) if branch else total_steps(stage, command.steps)
    fewest, most = command.worker_range()
    counts = dividing_counts(stage, fewest, most)
    selection = _selection(command.dataset, command.stage, stage)
    with _value_errors_are_usage_errors():
        channels, factor = codec_shape(stage.codec)
    check_grid(stage, factor)
    initial, origin = None, ""
    if newest is None and adapters is not None:
        initial, origin = adapters.checkpoint(command.stage, stage)
    elif newest is None:
        if stage.after is not None and command.start_from is None:
            restored += _restored(command, run, stage.after, checkpoints_before(stage.after, run, home).root)
        initial, origin = find_initial_checkpoint(command, stage, run, home)
    text_encoder = prepare_text_encoder(run, stage, selection, newest, branch or initial)
    with _value_errors_are_usage_errors():
        if adapters is not None:
            model = adapters.checked_model(stage, channels, text_encoder)
        else:
            older = _older_design(newest or initial)
            model = _model(stage, channels, text_width(text_encoder), older | model_fields)
            if stage.repa.features is not None:
                stage.repa.block_of(model)
    examples = example_texts(selection, 6)
    training = Training(
        stage_name=name,
        stage=stage,
        model=model,
        selection=selection,
        codec_factor=factor,
        run=str(run),
        folder=str(run / name),
        checkpoints=checkpoints,
        checkpoint_home=home,
        copies=_copies(command, name, checkpoints),
        text_encoder=text_encoder,
        example_prompts=examples,
        workers=counts[-1],
        fewest_workers=counts[0],
        micro_batch=micro_batch(stage, counts[-1]),
        checkpointing="none" if stage.checkpointing == "auto" else stage.checkpointing,
        start_step=0,
        stop_step=total,
        anneal=_anneal(branch) if branch else None,
        branch=branch,
        start_position=0,
        first_epoch=0,
        weights=None if adapters else initial,
        lora=adapters.lora if adapters else None,
        began_from=adapters.lora.base if adapters else initial.folder if initial else None,
        notes=(*restored, *notes),
        prompts=command.grid_prompts() or examples,
        audit=command.audit_file(),
        price_per_hour=command.price_per_hour,
        wandb=command.wandb,
        tagger=command.tagger_folder(),
        s3_wait=command.s3_wait,
        max_failures=command.max_failures,
    )
    if newest is not None:
        training = _resume(training, newest, command)
    else:
        if training.weights is not None:
            before = run_folder.config_of(training.weights)
            refuse_initial(changes.changes(before, training.record()), training.weights)
        training = replace(training, notes=(*training.notes, origin))
    run_folder.write_config(run, name, training.record())
    return training


@contextmanager
def _value_errors_are_usage_errors() -> Iterator[None]:
    """Codecs, encoders and models raise ValueError for a name or file that the user has given."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_optional_parts(stage: StageConfig, with_adapters: bool) -> None:
    """UsageError for parts that are off by default, where they cannot work."""
    if stage.fp8:
        if with_adapters:
            raise UsageError("fp8=true converts the layers that --lora adapts: set fp8=false")
        with _value_errors_are_usage_errors():
            check_installed()
    if stage.repa.features is not None:
        if with_adapters:
            raise UsageError("repa.features aligns whole models, not the adapters of --lora: leave it out")
        with _value_errors_are_usage_errors():
            vision_shape(stage.repa.features)


def _model(stage: StageConfig, channels: int, text_dim: int, fields: Mapping[str, Any]) -> XUTConfig:
    sizes = {"in_channels": channels, "patch_size": stage.patch_size, "text_dim": text_dim}
    return PRESETS[stage.model](**sizes, **fields)


def _older_design(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The model fields that did not exist yet when the checkpoint was saved, with the values that it implies."""
    if checkpoint is None:
        return {}
    recorded = run_folder.config_of(checkpoint)["model"]
    return {name: value for name, value in XUTConfig.from_dict(recorded).to_dict().items() if name not in recorded}


def _checkpoint_home(command: Command, run: Path) -> str | None:
    """The value of --checkpoints, or the one of the stage's last start."""
    if command.checkpoints is not None:
        given = command.checkpoints.rstrip("/")
        return given if given.startswith("s3://") else str(local_path("--checkpoints", given).resolve())
    return (run_folder.read_config(run, command.stage) or {}).get("checkpoints")


def _copies(command: Command, name: str, checkpoints: str) -> str | None:
    """The place of the stage's second copies. UsageError if it is that of the checkpoints."""
    if command.checkpoints_copy is None:
        return None
    home = command.checkpoints_copy.rstrip("/")
    if not home.startswith("s3://"):
        home = str(local_path("--checkpoints-copy", home).resolve())
    copies = Checkpoints.of_stage(home, name).root
    if copies == checkpoints:
        raise UsageError(f"--checkpoints-copy {home} is where the checkpoints are; give another disk or a bucket")
    return copies


def _restored(command: Command, run: Path, name: str, checkpoints: str) -> list[str]:
    """Restores the newest copy of a stage or anneal if `checkpoints` has lost it. Lines for the user."""
    copies = _copies(command, name, checkpoints)
    line = restore(run, name, checkpoints, copies) if copies else None
    return [line] if line else []


def _branch(command: Command, run: Path, home: str | None) -> Checkpoint | None:
    """The checkpoint that --anneal starts from; None without --anneal. UsageError if there is none of this stage."""
    if command.anneal is None:
        return None
    if command.start_from is None:
        found = Checkpoints(run_folder.checkpoints_of(run, command.stage, home)).newest()
        where = f"{run / command.stage} has no checkpoint; train that stage first, or name a checkpoint with --from"
    else:
        path = local_path("--from", command.start_from).resolve()
        found = run_folder.find_checkpoint(str(path), wanted=command.stage)
        where = f"--from {path} has no checkpoint; give a stage or checkpoint folder"
    if found is None:
        raise UsageError(f"--anneal {command.anneal} decays from a checkpoint: {where}")
    stage = str(run_folder.config_of(found)["stage_name"])
    if run_folder.stage_of(stage) != command.stage:
        raise UsageError(f"--anneal: {found.folder} is of stage {stage}, not of {command.stage}; give --stage {stage}")
    return found


def _anneal(branch: Checkpoint) -> Anneal:
    return Anneal(branch.step, Schedule.of(run_folder.config_of(branch)).factor(branch.step))


def _selection(dataset: str, stage_name: str, stage: StageConfig) -> Selection:
    try:
        selection = Selection.load(dataset, stage.selection, stage.resolution)
    except FileNotFoundError:
        name = f" --name {shlex.quote(stage.selection)}" if stage.selection != stage_name else ""
        curate = f"python pipeline/curate.py --dataset {shlex.quote(dataset)} --stage {stage_name}{name}"
        raise UsageError(f"{dataset} has no selection {stage.selection!r}; run: {curate}") from None
    if selection.count < 1:
        raise UsageError(f"the selection {stage.selection!r} of {dataset} is empty")
    return selection


def _resume(training: Training, newest: Checkpoint, command: Command) -> Training:
    """The job continued from the stage's newest checkpoint, with a note for every changed setting.

    UsageError for changes that the checkpoint cannot continue with (see changes.py).
    """
    state, before = newest.state(), run_folder.config_of(newest)
    changed = changes.changes(before, training.record())
    _refuse(
        affecting(changed, "weights", "adapters", "optimizer"),
        f"{training.folder} was started with other settings",
        "its weights and optimizer state are useless with these; set the same again, or give another --run folder",
    )
    config = run_folder.read_config(Path(training.run), training.stage_name)
    _refuse(
        affecting(changes.changes(before, config), "weights") if config else {},
        f"{training.folder}/config.json is not the config of the checkpoints in {training.checkpoints}",
        "remove it if the checkpoints are the right ones",
    )
    reordered = affecting(changed, "data order")
    _refuse(
        {} if command.new_order else reordered,
        f"{training.folder} was started with another data order",
        "set the same again, or start a new epoch with --new-order, which skips the rest of this one, or give another "
        "--run folder",
    )
    notes = [*training.notes, f"going on from step {newest.step} of {training.folder}"]
    notes += [f"since then {changes.listed({name: pair})}" for name, pair in changed.items()]
    if training.anneal is not None and newest == training.branch:
        rates = (training.schedule().rate(step) for step in (newest.step - 1, training.stop_step - 1))
        notes.append(
            f"anneal in {training.folder}: the learning rate falls from {next(rates):.3g} to {next(rates):.3g} at step "
            f"{training.stop_step}; {newest.folder} stays as it is"
        )
    elif before["steps"] != training.stop_step:
        notes.append(change_of_length(Schedule.of(before), training.schedule(), newest.step))
    training = replace(training.resumed_from(state), began_from=before["began_from"])
    if reordered:
        training = replace(training, start_position=0, first_epoch=state["epoch"] + 1)
        notes.append(f"new data order: epoch {training.first_epoch} begins")
    elif command.new_order:
        notes.append("--new-order has no effect: the data order has not changed")
    if command.start_from not in (None, "nothing") and training.lora is None and training.anneal is None:
        notes.append("--from has no effect: the stage already has checkpoints")
    return replace(training, notes=tuple(notes))


def _refuse(changed: Changes, what: str, remedy: str) -> None:
    if changed:
        raise UsageError(f"{what}: {changes.listed(changed)}; {remedy}")
