"""The weights on which a run trains adapters: found, and the very ones that it was begun on. Knows no dataset."""

from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.core.jobs import local_path
from trainer.encoders.text import text_width
from trainer.model.xut import XUT, XUTConfig
from trainer.recipe.changes import ENCODERS
from trainer.recipe.stages import StageConfig
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.run_folder import config_of
from trainer.runs.weights import Base, Lora, find_base, weights_hash


@dataclass(frozen=True)
class Adapted:
    base: Base
    model: XUTConfig
    lora: Lora

    def stage_fields(self) -> dict[str, Any]:
        """What of a stage follows from the weights: a checkpoint says with which encoders it was trained."""
        stage = self.base.stage or {}
        known = {name: stage[name] for name in ("model", *ENCODERS) if name in stage}
        return {"patch_size": self.model.patch_size, **known}

    def fitting(self, stage: StageConfig, channels: int, text_encoder: str) -> XUTConfig:
        """The architecture. UsageError, with the mend, unless the encoders give what it takes."""
        folder, model = self.base.folder, self.model
        if channels != model.in_channels:
            raise UsageError(
                f"the model in {folder} takes latents of {model.in_channels} channels, and codec {stage.codec} gives "
                f"{channels}: --set codec=... names the one that it was trained with"
            )
        try:
            width = text_width(text_encoder)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if width != model.text_dim:
            raise UsageError(
                f"the model in {folder} takes embeddings of {model.text_dim} values, and text encoder "
                f"{stage.text_encoder} gives {width}: --set text_encoder=... names the one that it was trained with"
            )
        return model


def adapted_weights(rank: int, start_from: str | None, own: Checkpoint | None) -> Adapted:
    """What --from names. Where `own`, the run's newest checkpoint, has adapters that were begun on weights in that same
    folder, or without --from, those weights: a run that is trained on has newer ones by now.

    UsageError, with the mend, where they are gone or changed, and for a rank out of its range.
    """
    begun = Lora.of(config_of(own)) if own else None
    given = None if start_from in (None, "nothing") else str(local_path("--from", str(start_from)).resolve())
    if given is None and begun is None:
        raise UsageError(
            "--lora trains adapters on weights that are there: give --from FOLDER, a run, stage or checkpoint of "
            "trainer/run.py, or a model folder of trainer/export.py --from-released"
        )
    try:
        if begun is not None and (given is None or f"{begun.base}/".startswith(f"{given}/")):
            return _checked(rank, begun.base, begun.base_model())
        base = find_base(str(given))
        if base is None:
            raise UsageError(
                f"--from {given} has no weights; give a run folder, a stage's in it, a checkpoint's, or a model folder"
            )
        return _checked(rank, base.folder, base.model())
    except ValueError as error:
        raise UsageError(str(error)) from error


def _checked(rank: int, folder: str, model: XUT) -> Adapted:
    if not 1 <= rank <= model.config.dim:
        raise UsageError(f"--lora {rank}: a rank from 1 to the model's width of {model.config.dim}, such as 16")
    base = find_base(folder)
    assert base is not None, folder
    return Adapted(base, model.config, Lora(rank, base.folder, weights_hash(model)))
