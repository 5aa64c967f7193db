"""A stage of the recipe with the changes of --set, its number of steps, and the micro batch of each worker."""

from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import UsageError
from trainer.model.config import XUTConfig
from trainer.recipe import overrides
from trainer.recipe.stages import STAGES, StageConfig

PRESETS = {"tiny": XUTConfig.tiny, "small": XUTConfig.small, "base": XUTConfig.base, "large": XUTConfig.large}

# Default encoders of --set model=tiny, so that any stage can be tried without a download.
_TINY_ENCODERS = {"codec": "dct", "text_encoder": "local"}
# Defaults of --lora. The stage's own schedule is meant for new weights.
_LORA_DEFAULTS = {
    "optimizer.kind": "adamw",
    "optimizer.learning_rate": 5e-4,
    "optimizer.warmup_steps": 100,
    "samples": 64_000,
    "batch_size": 32,
    "ema_decay": 0.995,  # for 2,000 steps
    "checkpoint_every": 250,
    "keep_every": 0,
    "evaluate_every": 250,
}
_CPU_MICRO_BATCH = 32
# Model fields that cannot be set, and the stage field that determines each.
_DETERMINED_BY = {"model.in_channels": "codec", "model.text_dim": "text_encoder", "model.patch_size": "patch_size"}


def stage_config(
    name: str, settings: dict[str, str], base: Mapping[str, Any] | None = None
) -> tuple[StageConfig, dict[str, Any], list[str]]:
    """The stage with its --set changes, the changed fields of the model, and notes for the user.

    `base` has the stage fields that follow from the weights below adapters; None if the whole model is trained.
    UsageError for an unknown stage, an unknown field or an invalid value.
    """
    if name not in STAGES:
        raise UsageError(f"there is no stage {name!r}; stages: {', '.join(STAGES)}")
    for field, text in settings.items():
        if field in _DETERMINED_BY:
            raise UsageError(f"--set {field}={text}: it follows from {_DETERMINED_BY[field]}; set that instead")
        if base is not None and field.partition(".")[0] in ("model", "patch_size"):
            raise UsageError(f"--set {field}={text}: with --lora the model is the one of --from")
    model_types = {f"model.{field}": hint for field, hint in overrides.field_types(XUTConfig).items()}
    known = {field: hint for field, hint in model_types.items() if field not in _DETERMINED_BY}
    values = overrides.typed(settings, overrides.field_types(StageConfig) | known)
    model = {field.removeprefix("model."): values.pop(field) for field in known if field in values}
    encoders, adapters, notes = {}, {}, []
    if values.get("model") == "tiny" and STAGES[name].model != "tiny":
        encoders = {field: encoder for field, encoder in _TINY_ENCODERS.items() if field not in values}
    if encoders:
        notes.append(f"--set model=tiny implies {_listed(encoders)}, unless --set gives others")
    if base is not None:
        adapters = _LORA_DEFAULTS | dict(base)
        defaults = {field: value for field, value in _LORA_DEFAULTS.items() if field not in values}
        notes.append(f"--lora implies {_listed(defaults)}, unless --set gives others")
    try:
        stage = overrides.replaced(STAGES[name], encoders | adapters | values)
    except ValueError as error:
        given = " ".join(f"--set {field}={settings[field]}" for field in values)
        raise UsageError(f"{given}: {error}") from error
    if stage.model not in PRESETS:
        raise UsageError(f"--set model={stage.model}: there is no such model; presets: {', '.join(PRESETS)}")
    return stage, model, notes


def _listed(fields: Mapping[str, Any]) -> str:
    return " and ".join(f"{field}={value}" for field, value in fields.items())


def check_grid(stage: StageConfig, factor: int) -> None:
    """UsageError unless a crop is a whole number of tokens. `factor`: pixels per latent, along a side."""
    token = factor * stage.patch_size
    if stage.resolution % token:
        below = stage.resolution // token * token
        nearest = [side for side in (below, below + token) if side]
        raise UsageError(
            f"resolution {stage.resolution} is not a multiple of the token size of {token} pixels (codec "
            f"{stage.codec}: {factor}, patch_size: {stage.patch_size}); nearest: --set resolution="
            + " or ".join(str(side) for side in nearest)
        )


def total_steps(stage: StageConfig, asked: int | None) -> int:
    """Optimizer steps of the stage: `asked`, or samples / batch_size rounded down. UsageError below 1."""
    if asked is not None and asked < 1:
        raise UsageError(f"--steps must be at least 1: got {asked}")
    total = asked if asked is not None else stage.samples // stage.batch_size
    if total < 1:
        raise UsageError(
            f"{stage.samples} samples are less than one batch of {stage.batch_size}: set more samples, or a smaller "
            "batch_size"
        )
    return total


def dividing_counts(stage: StageConfig, fewest: int, most: int) -> list[int]:
    """The numbers of workers from `fewest` to `most` that divide the batch. UsageError if there is none."""
    found = [count for count in range(max(1, fewest), most + 1) if stage.batch_size % count == 0]
    if not found:
        given = fewest if fewest == most else f"{fewest}-{most}"
        fitting = [count for count in range(1, stage.batch_size + 1) if stage.batch_size % count == 0]
        nearest = sorted(sorted(fitting, key=lambda count: abs(count - most))[:2])
        raise UsageError(
            f"--workers {given} does not divide the batch of {stage.batch_size}; nearest: {nearest}; or change the "
            "batch with --set batch_size=N"
        )
    return found


def micro_batch(stage: StageConfig, workers: int) -> int:
    """Samples per forward pass of a worker: the largest divisor of its share of the batch up to stage.micro_batch.

    For "auto" that is up to 32, as on a CPU, where more samples at once are not faster; a GPU's worker chooses later.
    UsageError unless the number of workers divides the batch.
    """
    dividing_counts(stage, workers, workers)
    share = stage.batch_size // workers
    largest = _CPU_MICRO_BATCH if stage.micro_batch == "auto" else stage.micro_batch
    return max(size for size in range(1, min(share, largest) + 1) if share % size == 0)
