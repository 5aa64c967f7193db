"""The weights a new stage starts from: a checkpoint of another stage or run, or the frozen base of adapters."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.core.jobs import local_path
from trainer.encoders.text import text_width
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT
from trainer.recipe import changes
from trainer.recipe.command import Command
from trainer.recipe.stages import StageConfig
from trainer.runs import run_folder
from trainer.runs.checkpoint import Checkpoint, Checkpoints
from trainer.runs.run_folder import config_of
from trainer.runs.weights import BaseWeights, Lora, find_base, is_model_folder, weights_hash

# --- Whole models -----------------------------------------------------------------------------------------------------


def find_initial_checkpoint(
    command: Command, stage: StageConfig, run: Path, home: str | None
) -> tuple[Checkpoint | None, str]:
    """The checkpoint whose weights a stage without checkpoints starts from, and a line for the user.

    None for new weights. UsageError if --from or the previous stage has no checkpoint, or has other encoders.
    """
    name = command.stage
    if command.start_from == "nothing" or (command.start_from is None and stage.after is None):
        return None, f"stage {name} begins with new weights"
    if command.start_from is not None:
        path = local_path("--from", command.start_from).resolve()
        found = run_folder.find_checkpoint(str(path), wanted=stage.after)
        if found is None:
            adapters = "; --lora RANK trains adapters on a model folder" if is_model_folder(path) else ""
            raise UsageError(f"--from {path} has no checkpoint; give a run, stage or checkpoint folder{adapters}")
        check_encoders(found, stage)
        return found, f"stage {name} begins with the weights of {found.folder}"
    assert stage.after is not None
    found = checkpoints_before(stage.after, run, home).newest()
    if found is None:
        raise UsageError(
            f"stage {name} begins with the weights of stage {stage.after}, of which {run} has no checkpoint; train "
            "that stage first, give --from FOLDER of another run, or --from nothing for new weights"
        )
    check_encoders(found, stage)
    return found, f"stage {name} begins with the weights of step {found.step} of stage {stage.after}: {found.folder}"


def checkpoints_before(previous: str, run: Path, home: str | None) -> Checkpoints:
    """Those of the previous stage: in `home`, or where it kept its own if there are none."""
    first, second = (Checkpoints(run_folder.checkpoints_of(run, previous, place)) for place in (home, None))
    return second if first.newest() is None and second.newest() is not None else first


def check_encoders(initial: Checkpoint, stage: StageConfig) -> None:
    """UsageError if the checkpoint was trained with another codec or text encoder."""
    before, now = config_of(initial)["stage"], asdict(stage)
    refuse_initial({n: (before[n], now[n]) for n in changes.ENCODERS if before[n] != now[n]}, initial)


def refuse_initial(changed: changes.Changes, initial: Checkpoint) -> None:
    """UsageError if anything in `changed` makes the weights of the checkpoint unusable."""
    if affected := changes.affecting(changed, "weights"):
        raise UsageError(
            f"the weights of {initial.folder} were trained with other settings: {changes.listed(affected)}; set the "
            "same, or begin with new weights: --from nothing"
        )


# --- Adapters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterBase:
    """The frozen weights that adapters are trained on."""

    base: BaseWeights
    model: XUTConfig
    lora: Lora

    def stage_fields(self) -> dict[str, Any]:
        """Stage fields that follow from the base. A checkpoint records its encoders, a model folder does not."""
        stage = self.base.stage or {}
        known = {name: stage[name] for name in ("model", *changes.ENCODERS) if name in stage}
        return {"patch_size": self.model.patch_size, **known}

    def checked_model(self, stage: StageConfig, channels: int, text_encoder: str) -> XUTConfig:
        """The model's config. UsageError unless codec and text encoder have the widths that it takes."""
        for field, what, wanted, found in (
            ("codec", "latent channels", self.model.in_channels, channels),
            ("text_encoder", "values per text token", self.model.text_dim, text_width(text_encoder)),
        ):
            if found != wanted:
                raise UsageError(
                    f"the model in {self.base.folder} takes {wanted} {what}, but {field} {getattr(stage, field)} gives "
                    f"{found}: --set {field}=... must name the one that it was trained with"
                )
        return self.model

    def checkpoint(self, name: str, stage: StageConfig) -> tuple[Checkpoint | None, str]:
        """The base's checkpoint, or None for a model folder, and a line for the user."""
        if self.base.checkpoint is not None:
            check_encoders(self.base.checkpoint, stage)
        return self.base.checkpoint, (
            f"stage {name} trains adapters of rank {self.lora.rank} on the weights of {self.base.folder}, which do not "
            "change. Keep them: the adapters are useless without them"
        )


def find_adapter_base(rank: int, start_from: str | None, newest: Checkpoint | None) -> AdapterBase:
    """The base given by --from, or the one that the run's newest checkpoint was trained on.

    The recorded base wins if it lies inside --from, because a run that is still trained has newer checkpoints.
    UsageError if the base is missing or has changed, or the rank is out of range.
    """
    recorded = Lora.of(config_of(newest)) if newest else None
    given = None if start_from in (None, "nothing") else str(local_path("--from", str(start_from)).resolve())
    if given is None and recorded is None:
        raise UsageError(
            "--lora trains adapters on existing weights: give --from FOLDER, a run, stage or checkpoint folder of "
            "trainer/run.py or a model folder of trainer/export.py --from-released"
        )
    if recorded is not None and (given is None or f"{recorded.base}/".startswith(f"{given}/")):
        return _adapter_base(rank, recorded.base, recorded.base_model())
    base = find_base(str(given))
    if base is None:
        raise UsageError(f"--from {given} has no weights; give a run, stage, checkpoint or model folder")
    return _adapter_base(rank, base.folder, base.model())


def _adapter_base(rank: int, folder: str, model: XUT) -> AdapterBase:
    if not 1 <= rank <= model.config.dim:
        raise UsageError(f"--lora {rank}: give a rank from 1 to the model's width of {model.config.dim}, such as 16")
    base = find_base(folder)
    assert base is not None, folder
    return AdapterBase(base, model.config, Lora(rank, base.folder, weights_hash(model)))
