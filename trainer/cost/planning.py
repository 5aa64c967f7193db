"""What a command asks to be planned -> settings, speeds, rows, and every assumption in words. Knows no terminal."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.errors import UsageError
from trainer.cost import costs
from trainer.cost.budget import affordable
from trainer.cost.costs import (
    EMBEDDED_CODECS,
    EMBEDDED_ENCODER,
    PUBLISHED,
    Machine,
    Measured,
    Pictures,
    Rates,
    Row,
    Setting,
    Speed,
)
from trainer.encoders.load_codec import codec_shape
from trainer.recipe import memory, overrides
from trainer.recipe.settings import PRESETS, check_grid, micro_batch, stage_config, total_steps
from trainer.recipe.stages import STAGES

RECIPE = tuple(PUBLISHED)
# Of a VAE and a language model that are not on this machine: those of the recipe.
_VAE_SHAPE = (4, 8)
_LOCAL_TEXT_WIDTH = 128  # of trainer/encoders/text.py, which takes seconds to import
_MEMORY_SHARE = 0.95  # of a GPU's memory; the rest is never free


@dataclass(frozen=True)
class Texts:
    """Tokens of a text -> how many texts, and where that comes from. None: every text is as long as may be."""

    lengths: Mapping[int, float] | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows of stages in training order, then perhaps of captions."""

    rows: tuple[Row, ...]
    total: Row

    @property
    def stages(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.samples)


# --- Settings ---------------------------------------------------------------------------------------------------------


def settings_for(name: str, planned: Sequence[str], settings: Sequence[str]) -> dict[str, str]:
    """Of --set: fields of every stage, and those that begin with this stage's name, as 512.samples=1000000. UsageError
    for a stage that is not planned."""
    chosen = []
    for setting in settings:
        head, _, rest = setting.partition(".")
        if head in STAGES and head not in planned:
            raise UsageError(f"--set {setting}: stage {head} is not planned; --stages {' '.join([*planned, head])}")
        if head not in STAGES or head == name:
            chosen.append(rest if head == name else setting)
    return overrides.parse(chosen)


def setting_of(name: str, settings: dict[str, str], gpus: int, texts: Texts) -> Setting:
    """A stage as it would be trained on so many GPUs. UsageError for what run.py would refuse."""
    stage, model_fields, _ = stage_config(name, settings)
    total_steps(stage, None)
    try:
        stage = replace(stage, micro_batch=micro_batch(stage, gpus))
        channels, factor = _shape(stage.codec)
        widths = {"text_dim": _LOCAL_TEXT_WIDTH} if stage.text_encoder == EMBEDDED_ENCODER else {}
        model = PRESETS[stage.model](in_channels=channels, patch_size=stage.patch_size, **widths, **model_fields)
    except UsageError as error:
        raise UsageError(str(error).replace("--workers", "--gpus")) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_grid(stage, factor)
    tokens = stage.text_tokens
    if texts.lengths:
        tokens = costs.padded_tokens(texts.lengths, stage.text_tokens, stage.text_multiple, stage.micro_batch)
    return Setting(name=name, stage=stage, model=model, codec_factor=factor, text_tokens=tokens)


def _shape(codec: str) -> tuple[int, int]:
    """Channels and factor, without the network."""
    return codec_shape(codec) if codec in EMBEDDED_CODECS or Path(codec).is_dir() else _VAE_SHAPE


def default_pictures(setting: Setting, images: int) -> Pictures:
    """Of so many pictures without a dataset: a tier of small ones serves the stages that it is large enough for."""
    small = setting.stage.resolution <= costs.SMALL_SIDE
    size = costs.BYTES_OF_A_SMALL_PICTURE if small else costs.BYTES_OF_A_PICTURE
    return Pictures(f"images-{costs.SMALL_SIDE}" if small else "images", images, images * size, size)


def default_captioned(pictures: Iterable[Pictures]) -> Pictures:
    """Captions are written before anything is selected or made smaller: at least for what the largest stage has."""
    images = max(found.images for found in pictures)
    return Pictures("images", images, images * costs.BYTES_OF_A_PICTURE, costs.BYTES_OF_A_PICTURE)


# --- Speeds and rows --------------------------------------------------------------------------------------------------


def speed_of(
    setting: Setting, machine: Machine, given: Mapping[str, float], measured: Sequence[Measured] | None
) -> Speed:
    """UsageError for a stage of which nothing is known. `measured`: of a probe; None where none was asked for."""
    if setting.name in given:
        speed = given[setting.name]
        return Speed(speed, "given", f"--images-per-second {setting.name}={speed:g}")
    if measured is not None:
        return costs.measured_speed(setting, machine, measured)
    published = costs.published_speed(setting, machine)
    if published is None:
        raise UsageError(
            f"stage {setting.name} has no published speed; --measure times it here, or give the images/s of a run's "
            f"metrics.jsonl: --images-per-second {setting.name}=87"
        )
    return published


def make_plan(
    settings: Sequence[Setting],
    pictures: Mapping[str, Pictures],
    speeds: Mapping[str, Speed],
    rates: Rates,
    captions_per_second: float | None,
    captioned: Pictures,
) -> Plan:
    """`captioned`: what captions are written for, where their speed is given."""
    rows = [
        costs.stage_row(s, pictures[s.name], speeds[s.name], rates, memory.parameters(s.model)) for s in settings
    ]  # fmt: skip
    folders: dict[str, float] = {}
    read = [*pictures.values(), *([captioned] if captions_per_second is not None else [])]
    for found in read:
        folders[found.folder] = max(folders.get(found.folder, 0), found.stored_bytes)
    if captions_per_second is not None:
        rows.append(costs.caption_row(captions_per_second, captioned, rates))
    return Plan(rows=tuple(rows), total=costs.total_row(rows, folders))


def within_budget(
    settings: Sequence[Setting], plan: Plan, budget: float, planned: Callable[[Sequence[Setting]], Plan]
) -> tuple[list[Setting], Plan]:
    """The stages with so many samples less that the plan costs at most `budget`. UsageError where that is not sensible,
    as where a stage would be left out. The price of a GPU hour must be known."""
    assert plan.total.dollars is not None
    stages = {row.name: row.dollars or 0.0 for row in plan.stages}
    besides = plan.total.dollars - sum(stages.values())
    if budget <= besides:
        raise UsageError(f"--budget {budget:g} does not pay for the captions, which cost ${besides:,.2f}")
    try:
        shares = affordable(stages, budget - besides)
    except ValueError as error:
        more = f", and the captions ${besides:,.2f} more" if besides else ""
        raise UsageError(
            f"--budget {budget:g} {error}{more}; give that, or plan fewer --stages, a smaller model, a cheaper GPU"
        ) from error
    shorter = [_shortened(setting, shares[setting.name]) for setting in settings]
    return shorter, planned(shorter)


def _shortened(setting: Setting, share: float) -> Setting:
    """Whole batches, at least one."""
    stage = setting.stage
    if share >= 1:
        return setting
    batches = max(1, math.floor(stage.samples * share / stage.batch_size))
    return replace(setting, stage=replace(stage, samples=batches * stage.batch_size))


def command_of(
    setting: Setting, chosen: Mapping[str, str], machine: Machine, dataset: str | None, before: str | None
) -> list[str]:
    """The words that train the stage as planned; `chosen`: what --set changes in this plan; `before`: the stage that is
    planned before this one."""
    stage = setting.stage
    words = ["python", "trainer/run.py", "--stage", setting.name, "--dataset", dataset or "ROOT", "--run", "RUN"]
    words += ["--workers", str(machine.count)]
    if stage.after not in (None, before):
        words += ["--from", f"RUN/{before}" if before else "FOLDER"]
    values = dict(chosen)
    if stage.samples != STAGES[setting.name].samples:
        values["samples"] = str(stage.samples)
    fitting = fitting_micro_batch(setting, machine)
    if fitting and fitting < stage.micro_batch:
        values["micro_batch"] = str(fitting)
    for name, value in values.items():
        words += ["--set", f"{name}={value}"]
    if machine.price is not None:
        words += ["--price-per-hour", f"{machine.count * machine.price:.4g}"]
    return words


# --- Assumptions ------------------------------------------------------------------------------------------------------


def fitting_micro_batch(setting: Setting, machine: Machine) -> int | None:
    """The largest part of the stage's micro batch that fits into a GPU by trainer/recipe/memory.py; 0: not one sample; None:
    its memory is not known."""
    if machine.gigabytes is None:
        return None
    size = setting.stage.micro_batch
    room = _MEMORY_SHARE * machine.gigabytes * 2**30
    while size and memory.training_bytes(setting.model, setting.stage, size, setting.codec_factor) > room:
        size //= 2
    return size


def memory_remarks(settings: Sequence[Setting], machine: Machine) -> list[str]:
    remarks = []
    for setting in settings:
        size, fitting = setting.stage.micro_batch, fitting_micro_batch(setting, machine)
        if fitting is None or fitting == size:
            continue
        needed = memory.training_bytes(setting.model, setting.stage, size, setting.codec_factor) / 1e9
        mend = f"--set {setting.name}.micro_batch={fitting} fits" if fitting else "not even one sample fits"
        remarks.append(
            f"stage {setting.name}: a micro batch of {size} needs about {needed:.0f} GB and {machine.name} has "
            f"{machine.gigabytes:g}: {mend} (an estimate)"
        )
    return remarks


def measured_remark(found: Measured) -> str:
    setting, stage = found.setting, found.setting.stage
    memory_used = "" if found.memory_bytes is None else f", {found.memory_bytes / 2**30:.1f} GiB at most"
    return (
        f"measured: stage {setting.name}, model {stage.model}, {stage.resolution} pixels, {setting.text_tokens} text "
        f"tokens, {found.encoders}, on {found.device}: {found.steps} steps of {stage.micro_batch} in "
        f"{found.seconds:.1f} s{memory_used}, after one that is not counted; an optimizer step after each, synthetic "
        "batches"
    )


def speed_remarks(rows: Sequence[Row], settings: Sequence[Setting], machine: Machine) -> list[str]:
    remarks = [f"speed of {row.name}: {row.source}: {row.remark}" for row in rows]
    if any(row.source == "scaled" for row in rows):
        remarks.append(
            "scaled speeds take the same share of the peak for granted, a time that goes with the arithmetic, and N "
            "GPUs to be N times as fast as one"
        )
    if any(row.name == "1024" and "the papers'" in row.remark for row in rows):
        remarks.append(
            "the papers' 1024 stage is taken as dense, as they say; their public code routes half of the tokens where "
            "the rate is 0, so that a dense stage may take longer than its 49 h"
        )
    others = {
        name
        for setting in settings
        for name, known in (
            (setting.stage.codec, (*EMBEDDED_CODECS, STAGES["256"].codec)),
            (setting.stage.text_encoder, (EMBEDDED_ENCODER, STAGES["256"].text_encoder)),
        )
        if name not in known
    }
    if others:
        listed = ", ".join(sorted(others))
        remarks.append(f"the arithmetic of {listed} is taken to be that of SDXL's VAE or Qwen3-0.6B")
    return remarks


def device_remarks(settings: Sequence[Setting], machine: Machine) -> list[str]:
    """Of a CPU, where run.py trains nothing but tiny models."""
    models = sorted({setting.stage.model for setting in settings} - {"tiny"})
    if not (machine.name.startswith("CPU") and models):
        return []
    return [f"without a GPU run.py refuses model {', '.join(models)}: --set model=tiny plans what it would train"]


def text_remarks(settings: Sequence[Setting], texts: Mapping[str, Texts]) -> list[str]:
    said: dict[str, list[str]] = {}
    for setting in settings:
        said.setdefault(texts[setting.name].source, []).append(f"{setting.name} {setting.text_tokens}")
    return [f"text tokens, padding included: {', '.join(tokens)}: {source}" for source, tokens in said.items()]


def cost_remarks(rates: Rates, price_source: str, with_dataset: bool) -> list[str]:
    machine = rates.machine
    remarks = []
    if machine.price is None:
        remarks.append("dollars: no --price of a GPU hour")
    else:
        remarks.append(f"dollars: ${machine.price:.4g} a GPU hour{price_source}, nothing else")
    if machine.watts is None:
        remarks.append("energy: the board's power is not known; give --watts")
    else:
        tariff = "" if rates.dollars_per_kwh is None else f", at ${rates.dollars_per_kwh:g} a kWh"
        remarks.append(
            f"energy: each GPU at its full {machine.watts:g} W all the time and {rates.host_watts:g} W for the rest of "
            f"the machine{tariff}"
        )
    if with_dataset:
        remarks.append("pictures: sizes of the dataset's files; each epoch reads its shards once, unselected rows too")
    else:
        remarks.append(
            f"pictures: {costs.BYTES_OF_A_PICTURE // 1000} kB each (the papers: 1.4 to 1.8 TB for 7.6M), "
            f"{costs.BYTES_OF_A_SMALL_PICTURE // 1000} kB in a tier of {costs.SMALL_SIDE} pixels for stages up to that"
        )
    remarks.append("checkpoints: 16 bytes a parameter, as many as keep_last and keep_every leave and one being written")
    remarks.append(
        "not counted: renting before and after, downloads, the start of Ray, compiling (minutes a stage), evaluation, "
        "waiting for data or checkpoints, steps lost to failures"
    )
    return remarks
