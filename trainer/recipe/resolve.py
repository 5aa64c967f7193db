"""A command line -> one resolved training job, checked against the run folder it goes on from. Knows nothing of Ray."""

import filecmp
import math
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.core.jobs import local_path
from trainer.encoders.load_codec import codec_shape
from trainer.encoders.text import build_local_text_encoder, text_width
from trainer.model.xut import XUTConfig
from trainer.recipe import changes, memory, overrides
from trainer.recipe.adapted import Adapted, adapted_weights
from trainer.recipe.settings import PRESETS, check_grid, micro_batch, stage_config, total_steps
from trainer.recipe.stages import StageConfig
from trainer.runs import run_folder
from trainer.runs.checkpoint import Checkpoint, Checkpoints, training_state
from trainer.runs.model_folder import is_model_folder
from trainer.runs.run_folder import text_encoder_of
from trainer.runs.weights import Lora
from trainer.samples.data import CropConfig, Selection, example_texts, selection_texts

_TINY_MILLIONS = 20  # parameters that a CPU trains, not by the preset's name: a model folder has none


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line asks for, as text and numbers."""

    stage: str
    dataset: str
    run: str
    checkpoints: str | None = None  # folder or s3:// prefix that holds <stage>/checkpoints instead of the run folder
    workers: int = 1
    steps: int | None = None  # in all, instead of the stage's own number
    settings: Sequence[str] = ()  # of --set
    start_from: str | None = None  # a run or checkpoint folder, or "nothing"; None: the stage before in this run
    lora: int | None = None  # rank of adapters, which are trained instead of the whole model
    new_order: bool = False  # begin a new epoch where the order of the data is another one since the checkpoint
    audit: str | None = None
    price_per_hour: float | None = None
    wandb: bool = False
    tagger: str | None = None
    prompts: str | None = None
    max_failures: int = 3


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training job, resolved: what every worker needs to know. Paths are absolute and seen by every worker."""

    stage_name: str
    stage: StageConfig
    model: XUTConfig
    selection: Selection
    codec_factor: int  # pixels along the side of one latent
    run: str  # the run folder, of all stages
    folder: str  # of this stage: config.json, metrics.jsonl
    checkpoints: str  # folder or s3:// prefix of this stage's checkpoints
    checkpoint_home: str | None  # what --checkpoints named
    text_encoder: str  # folder or hub name
    example_prompts: list[str]  # texts of the selection: what to ask a picture of
    workers: int
    micro_batch: int  # samples that a worker takes through the model at once
    start_step: int  # optimizer steps taken before; above 0 the model is the newest checkpoint's
    stop_step: int  # also the end of the learning rate's schedule
    start_position: int  # of the data order, at start_step; a multiple of the batch
    first_epoch: int  # number of the epoch that begins at position 0
    weights: Checkpoint | None  # of another stage or run: its model and EMA are where step 0 begins
    lora: Lora | None  # adapters are trained, on these weights
    began_from: str | None  # that checkpoint's folder, also in the runs that go on from there
    notes: tuple[str, ...]  # what the user should know before it starts, a line each
    prompts: list[str]  # of the picture grid while training
    audit: str | None  # file that gets a line per step and worker: which samples it saw
    price_per_hour: float | None  # dollars, of the whole cluster
    wandb: bool
    tagger: str | None  # folder of a classifier that judges the pictures
    max_failures: int  # of workers or nodes, after each of which training starts again from the newest checkpoint

    @property
    def accumulation(self) -> int:
        """Micro batches of a worker in one optimizer step."""
        return self.stage.batch_size // (self.workers * self.micro_batch)

    def position(self, step: int) -> int:
        """Of the first sample of step number `step` (from 0, and not before start_step)."""
        return self.start_position + (step - self.start_step) * self.stage.batch_size

    def crop(self) -> CropConfig:
        return CropConfig(self.stage.resolution, self.stage.captions, self.stage.seed, self.stage.flip)

    def record(self) -> dict[str, Any]:
        """What the run trains and on what, as JSON: saved with the run and with every checkpoint."""
        selection = {
            "dataset": self.selection.dataset,
            "name": self.selection.name,
            "hash": self.selection.digest,
            "images": self.selection.images,
        }
        return {
            "stage_name": self.stage_name,
            "stage": asdict(self.stage),
            "model": self.model.to_dict(),
            "selection": selection,
            "steps": self.stop_step,
            "workers": self.workers,
            "checkpoints": self.checkpoint_home,
            "began_from": self.began_from,
            "lora": asdict(self.lora) if self.lora else None,
            "run": self.run,
            "example_prompts": self.example_prompts,
        }

    def state(self, step: int, epoch: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps keeps besides tensors; `epoch` is the one that goes on there."""
        return training_state(
            stage_name=self.stage_name,
            epoch=epoch,
            position=self.position(step),
            first_epoch=self.first_epoch,
            seed=self.stage.seed,
            config=self.record(),
            selection=self.selection.digest,
        )

    def going_on_from(self, state: dict[str, Any]) -> "Training":
        """The same job from a checkpoint with this state.json: what a worker that was started again goes on with."""
        return replace(
            self,
            weights=None,
            start_step=state["step"],
            start_position=state["position"],
            first_epoch=state["first_epoch"],
        )


def resolve(command: Command) -> Training:
    """UsageError, with the mend, for anything that the command, the dataset or the run folder make impossible.

    Leaves the resolved config in the stage's folder, and the text encoder "local" in the run's.
    """
    run = local_path("--run", command.run).resolve()
    if run.is_file():
        raise UsageError(f"--run {run} is a file; give a folder, which is made where there is none")
    home = _checkpoint_home(command, run)
    checkpoints = run_folder.checkpoints_of(run, command.stage, home)
    own = Checkpoints(checkpoints).newest()
    adapted = adapted_weights(command.lora, command.start_from, own) if command.lora is not None else None
    stage, model_fields, notes = stage_config(
        command.stage, overrides.parse(command.settings), adapted.stage_fields() if adapted else None
    )
    total = total_steps(stage, command.steps)
    micro = micro_batch(stage, command.workers)
    selection = _selection(command.dataset, command.stage, stage)
    channels, factor = _codec_shape(stage.codec)
    check_grid(stage, factor)
    donor, origin = (None, "") if own else _donor(command, stage, run, home, adapted)
    text_encoder = _text_encoder(run, stage, selection, own, donor)
    examples = example_texts(selection, 6)
    training = Training(
        stage_name=command.stage,
        stage=stage,
        model=adapted.fitting(stage, channels, text_encoder)
        if adapted
        else _model(stage, model_fields, channels, text_encoder),
        selection=selection,
        codec_factor=factor,
        run=str(run),
        folder=str(run_folder.stage_folder(run, command.stage)),
        checkpoints=checkpoints,
        checkpoint_home=home,
        text_encoder=text_encoder,
        example_prompts=examples,
        workers=command.workers,
        micro_batch=micro,
        start_step=0,
        stop_step=total,
        start_position=0,
        first_epoch=0,
        weights=None if adapted else donor,
        lora=adapted.lora if adapted else None,
        began_from=adapted.lora.base if adapted else donor.folder if donor else None,
        notes=tuple(notes),
        prompts=examples if command.prompts is None else _prompts(local_path("--prompts", command.prompts)),
        audit=_audit(command.audit),
        price_per_hour=_price(command.price_per_hour),
        wandb=command.wandb,
        tagger=_tagger(command.tagger),
        max_failures=_max_failures(command.max_failures),
    )
    if own is not None:
        training = _going_on(training, own, command)
    else:
        if training.weights is not None:
            _check_donor(training, training.weights)
        training = replace(training, notes=(*training.notes, origin))
    run_folder.write_config(run, command.stage, training.record())
    return training


def check_device(training: Training, gpus: int) -> None:
    """UsageError where a model that is not tiny has no GPU: what it would need (see memory.training_bytes), and how to
    try the stage without."""
    millions = memory.parameters(training.model) / 1e6
    if gpus or millions < _TINY_MILLIONS:
        return
    stage, factor, frozen = training.stage, training.codec_factor, training.lora is not None
    needed = memory.training_bytes(training.model, stage, training.micro_batch, factor, frozen) / 1e9
    sample = memory.activation_bytes(training.model, stage, factor) / 1e6
    raise UsageError(
        f"there is no GPU, and stage {training.stage_name} trains {'adapters on ' if frozen else ''}{millions:.0f}M "
        f"parameters, for which each worker needs a GPU with about {needed:.0f} GB ({4 if frozen else 20} bytes a "
        f"parameter + {training.micro_batch} samples of {sample:.0f} MB + 3 GB); less with --set "
        f"micro_batch={max(1, training.micro_batch // 4)}. To try the stage on this machine: --set model=tiny --set "
        "codec=dct --set text_encoder=local --set batch_size=8 --steps 10, and --run with a folder of its own"
    )


# --- Model, data and encoders ---------------------------------------------------------------------------------------


def _model(stage: StageConfig, model_fields: dict[str, Any], channels: int, text_encoder: str) -> XUTConfig:
    try:
        text_dim = text_width(text_encoder)
        return PRESETS[stage.model](
            in_channels=channels, patch_size=stage.patch_size, text_dim=text_dim, **model_fields
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _codec_shape(name: str) -> tuple[int, int]:
    """Channels of a latent, and pixels along its side."""
    try:
        return codec_shape(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _selection(dataset: str, name: str, stage: StageConfig) -> Selection:
    """Of the stage `name`."""
    try:
        selection = Selection.load(dataset, stage.selection, stage.resolution)
    except FileNotFoundError:
        named = f"--stage {name}" + (f" --name {shlex.quote(stage.selection)}" if stage.selection != name else "")
        mend = f"run: python pipeline/curate.py --dataset {shlex.quote(dataset)} {named}"
        raise UsageError(f"{dataset} has no selection {stage.selection!r}; {mend}") from None
    if selection.count < 1:
        raise UsageError(f"the selection {stage.selection!r} of {dataset} is empty")
    return selection


def _text_encoder(
    run: Path, stage: StageConfig, selection: Selection, own: Checkpoint | None, donor: Checkpoint | None
) -> str:
    """Its folder or name. One called "local" is the one that the weights were trained with; a run that has none yet
    makes it anew each time: the selection may be another one by now."""
    name = text_encoder_of(run, stage.text_encoder)
    if stage.text_encoder != "local":
        return name
    folder = Path(name)
    in_use = own is not None or any(map(_is_local, run_folder.newest_by_stage(run).values()))
    if donor is not None and run_folder.text_encoder_of_checkpoint(donor) != name:
        _copy_text_encoder(Path(run_folder.text_encoder_of_checkpoint(donor)), folder, in_use)
    elif donor is None and not in_use:
        shutil.rmtree(folder, ignore_errors=True)
        build_local_text_encoder(selection_texts(selection), folder, stage.seed)
    elif not folder.is_dir():
        raise UsageError(f"{folder} is gone, and the checkpoints of {run} were trained with it: put it back")
    return name


def _is_local(found: Checkpoint) -> bool:
    return bool(run_folder.config_of(found)["stage"]["text_encoder"] == "local")


def _copy_text_encoder(source: Path, folder: Path, in_use: bool) -> None:
    """Another run's, whose weights know no other one."""
    if not source.is_dir():
        raise UsageError(f"the weights of --from were trained with {source}, which is gone: put it back")
    if in_use:
        names = [path.name for path in source.iterdir()]
        if not folder.is_dir() or filecmp.cmpfiles(source, folder, names, shallow=False)[0] != names:
            raise UsageError(
                f"the weights of --from were trained with {source}, and other stages of this run with {folder}: "
                "give another --run folder"
            )
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)


# --- Where training begins ------------------------------------------------------------------------------------------


def _checkpoint_home(command: Command, run: Path) -> str | None:
    """What --checkpoints names now, or named when the stage was last started."""
    if command.checkpoints is not None:
        given = command.checkpoints.rstrip("/")
        return given if given.startswith("s3://") else str(local_path("--checkpoints", given).resolve())
    return (run_folder.read_config(run, command.stage) or {}).get("checkpoints")


def _donor(
    command: Command, stage: StageConfig, run: Path, home: str | None, adapted: Adapted | None
) -> tuple[Checkpoint | None, str]:
    """The checkpoint whose weights, and text encoder, a stage without own ones begins with, and a line that says so."""
    name = command.stage
    if adapted is not None:
        if adapted.base.checkpoint is not None:
            _check_encoders(adapted.base.checkpoint, stage)
        kept = "which stay as they are; keep them: the adapters mean nothing without"
        return adapted.base.checkpoint, (
            f"stage {name} trains adapters of rank {adapted.lora.rank} on the weights of {adapted.base.folder}, {kept}"
        )
    if command.start_from == "nothing":
        return None, f"stage {name} begins with new weights"
    if command.start_from is not None:
        path = local_path("--from", command.start_from).resolve()
        found = run_folder.find_checkpoint(str(path), wanted=stage.after)
        if found is None:
            adapters = "; --lora RANK trains adapters on a model folder" if is_model_folder(path) else ""
            raise UsageError(
                f"--from {path} has no checkpoint; give a run folder, a stage's in it, or a checkpoint's{adapters}"
            )
        _check_encoders(found, stage)
        return found, f"stage {name} begins with the weights of {found.folder}"
    if stage.after is None:
        return None, f"stage {name} begins with new weights"
    places = (run_folder.checkpoints_of(run, stage.after, home), run_folder.checkpoints_of(run, stage.after))
    found = Checkpoints(places[0]).newest() or Checkpoints(places[1]).newest()
    if found is None:
        raise UsageError(
            f"stage {name} begins with the weights of stage {stage.after}, of which {run} has no checkpoint; train "
            "that first, give --from FOLDER of another run, or --from nothing for new weights"
        )
    _check_encoders(found, stage)
    return found, f"stage {name} begins with the weights of step {found.step} of stage {stage.after}: {found.folder}"


def _check_encoders(found: Checkpoint, stage: StageConfig) -> None:
    """Before an encoder is made or copied for weights that know another one."""
    before, now = run_folder.config_of(found)["stage"], asdict(stage)
    encoders = {name: (before[name], now[name]) for name in changes.ENCODERS}
    _refuse_donor({name: pair for name, pair in encoders.items() if pair[0] != pair[1]}, found)


def _check_donor(training: Training, donor: Checkpoint) -> None:
    _refuse_donor(changes.of_weights(changes.changes(run_folder.config_of(donor), training.record())), donor)


def _refuse_donor(changed: changes.Changes, donor: Checkpoint) -> None:
    what = f"the weights of {donor.folder} are of other settings"
    _refuse(changed, what, "set the same, or begin with new weights: --from nothing")


def _refuse(changed: changes.Changes, what: str, mend: str) -> None:
    if changed:
        raise UsageError(f"{what}: {changes.listed(changed)}; {mend}")


def _going_on(training: Training, own: Checkpoint, command: Command) -> Training:
    """The job from the run's own newest checkpoint, with a line for what is another setting by now.

    UsageError for changes that the run cannot bear (trainer.recipe.changes).
    """
    state, before = own.state(), run_folder.config_of(own)
    changed = changes.changes(before, training.record())
    _refuse(
        changes.of_weights(changed) | changes.of_adapters(changed) | changes.of_state(changed),
        f"{training.folder} was begun with other settings",
        "its weights and its optimizer's state mean nothing to these; set the same again, or give another --run folder",
    )
    config = run_folder.read_config(Path(training.run), training.stage_name)
    _refuse(
        changes.of_weights(changes.changes(before, config)) if config else {},
        f"{training.folder}/config.json is not that of the checkpoints in {training.checkpoints}",
        "remove it if the checkpoints are the right ones",
    )
    order = changes.of_order(changed)
    _refuse(
        {} if command.new_order else order,
        f"{training.folder} was begun with another order of the data",
        "set the same again, or begin a new epoch with --new-order (what is left of this one is not seen), or give "
        "another --run folder",
    )
    notes = [*training.notes, f"going on from step {own.step} of {training.folder}"]
    notes += [f"since then {changes.listed({name: pair})}" for name, pair in changed.items()]
    training = replace(training.going_on_from(state), began_from=before["began_from"])
    if order:
        training = replace(training, start_position=0, first_epoch=state["epoch"] + 1)
        notes.append(f"a new order of the data: epoch {training.first_epoch} begins")
    elif command.new_order:
        notes.append("--new-order: the order of the data is the same; going on where it stopped")
    if command.start_from not in (None, "nothing") and training.lora is None:
        notes.append("--from is for a stage without checkpoints: left out")
    return replace(training, notes=tuple(notes))


# --- The other flags ------------------------------------------------------------------------------------------------


def _prompts(path: Path) -> list[str]:
    """The file's lines but for empty ones."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: {error}; give a text file of one prompt a line") from error
    if not prompts:
        raise UsageError(f"--prompts {path} is empty; give a text file of one prompt a line")
    return prompts


def _audit(path: str | None) -> str | None:
    """Absolute: workers run in folders of their own. It can be appended to: that fails here, not at the first step."""
    if path is None:
        return None
    file = local_path("--audit", path).resolve()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()
    except OSError as error:
        raise UsageError(f"--audit {file}: {error.strerror}; give a file that can be written") from error
    return str(file)


def _price(dollars: float | None) -> float | None:
    if dollars is not None and not 0 <= dollars < math.inf:
        raise UsageError(f"--price-per-hour {dollars}: dollars for an hour of the whole cluster, at least 0")
    return dollars


def _tagger(path: str | None) -> str | None:
    if path is None:
        return None
    folder = local_path("--tagger", path).resolve()
    if not any((folder / name).is_file() for name in ("model.onnx", "config.json")):
        raise UsageError(
            f"--tagger {folder} has neither model.onnx nor config.json; give a folder with a classifier, as for "
            "pipeline/score.py --model"
        )
    return str(folder)


def _max_failures(count: int) -> int:
    if count < 0:
        raise UsageError(f"--max-failures {count}: at least 0")
    return count
