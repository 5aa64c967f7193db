"""The settings of one training: a stage with what --set changes, its steps, and how workers share a batch."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import UsageError
from trainer.model.xut import XUTConfig
from trainer.recipe import overrides
from trainer.recipe.stages import STAGES, StageConfig

PRESETS = {"tiny": XUTConfig.tiny, "small": XUTConfig.small, "base": XUTConfig.base, "large": XUTConfig.large}

# What a tiny model is trained with unless told otherwise, so that any stage can be tried without a download.
_EMBEDDED = {"codec": "dct", "text_encoder": "local"}
# Of a run that trains adapters, unless told otherwise: a stage is a schedule for new weights.
_LORA = {
    "optimizer.kind": "adamw",
    "optimizer.learning_rate": 5e-4,
    "optimizer.warmup_steps": 100,
    "samples": 64_000,
    "batch_size": 32,
    "ema_decay": 0.995,  # 2,000 steps
    "checkpoint_every": 250,
    "keep_every": 0,
    "evaluate_every": 250,
}
# Fields of the model that follow from others, and from which.
_FOLLOWS_FROM = {"model.in_channels": "codec", "model.text_dim": "text_encoder", "model.patch_size": "patch_size"}


def stage_config(
    name: str, settings: dict[str, str], base: Mapping[str, Any] | None = None
) -> tuple[StageConfig, dict[str, Any], list[str]]:
    """The stage with what --set changes of it, the fields that it changes of the model, and notes for the user.

    base: fields of the stage that follow from the weights on which adapters are trained, unless --set names others.
    """
    if name not in STAGES:
        raise UsageError(f"there is no stage {name!r}; stages: {', '.join(STAGES)}")
    for field, source in _FOLLOWS_FROM.items():
        if field in settings:
            raise UsageError(f"--set {field}={settings[field]}: it follows from {source}; set that instead")
    for field in settings if base is not None else ():
        if field.partition(".")[0] in ("model", "patch_size"):
            raise UsageError(f"--set {field}={settings[field]}: with --lora the model is that of --from")
    model_types = {f"model.{field}": hint for field, hint in overrides.field_types(XUTConfig).items()}
    known = {field: hint for field, hint in model_types.items() if field not in _FOLLOWS_FROM}
    values = overrides.typed(settings, overrides.field_types(StageConfig) | known)
    model = {field.removeprefix("model."): values.pop(field) for field in known if field in values}
    embedded = _embedded(STAGES[name], values)
    try:
        stage = overrides.replaced(STAGES[name], embedded | (_LORA | dict(base) if base is not None else {}) | values)
    except ValueError as error:
        given = " ".join(f"--set {field}={settings[field]}" for field in values)
        raise UsageError(f"{given}: {error}") from error
    if stage.model not in PRESETS:
        raise UsageError(f"--set model={stage.model}: there is no such model; presets: {', '.join(PRESETS)}")
    notes = [f"a tiny model comes with {_listed(embedded)}, unless --set names others"] if embedded else []
    if base is not None:
        defaults = {field: value for field, value in _LORA.items() if field not in values}
        notes.append(f"adapters are trained with {_listed(defaults)}, unless --set names others")
    return stage, model, notes


def _listed(fields: Mapping[str, Any]) -> str:
    return " and ".join(f"{field}={value}" for field, value in fields.items())


def _embedded(stage: StageConfig, values: dict[str, Any]) -> dict[str, str]:
    """The encoders that come with a tiny model where the stage itself has a larger one."""
    if values.get("model") != "tiny" or stage.model == "tiny":
        return {}
    return {field: name for field, name in _EMBEDDED.items() if field not in values}


def check_grid(stage: StageConfig, factor: int) -> None:
    """UsageError unless a crop is a whole number of tokens; factor: pixels along the side of one latent."""
    token = factor * stage.patch_size
    if stage.resolution % token:
        below = stage.resolution // token * token
        nearest = [side for side in (below, below + token) if side]
        raise UsageError(
            f"resolution {stage.resolution} is no whole number of tokens of {token} pixels (codec {stage.codec}: "
            f"{factor}, patch_size: {stage.patch_size}); nearest: --set resolution="
            + " or ".join(str(side) for side in nearest)
        )


def total_steps(stage: StageConfig, asked: int | None) -> int:
    """Optimizer steps in all: what is asked for, else the stage's samples."""
    if asked is not None and asked < 1:
        raise UsageError(f"--steps must be at least 1: got {asked}")
    total = asked if asked is not None else stage.samples // stage.batch_size
    if total < 1:
        raise UsageError(
            f"{stage.samples} samples are less than one batch of {stage.batch_size}: set more samples, or a smaller "
            "batch_size"
        )
    return total


def micro_batch(stage: StageConfig, workers: int) -> int:
    """Samples that a worker takes at once: its share of the batch in the fewest equal parts of at most the stage's
    micro_batch. UsageError unless the workers share the streams of the data order evenly."""
    streams = math.gcd(stage.streams, stage.batch_size)
    if workers < 1 or streams % workers:
        fitting = [count for count in range(1, streams + 1) if streams % count == 0]
        nearest = sorted(sorted(fitting, key=lambda count: abs(count - workers))[:2])
        raise UsageError(
            f"--workers {workers} does not divide the {streams} streams of the batch of {stage.batch_size} (the common "
            f"divisor of streams {stage.streams} and the batch); nearest: {nearest}"
        )
    share = stage.batch_size // workers
    return max(size for size in range(1, min(share, stage.micro_batch) + 1) if share % size == 0)
