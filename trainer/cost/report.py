"""A plan as text: the table, its assumptions, and the commands that carry it out."""

import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.cost import estimate
from trainer.cost.estimate import Row
from trainer.cost.machines import PAPERS, PAPERS_PRICES, Machine
from trainer.cost.stage_setup import StageSetup
from trainer.recipe import memory
from trainer.recipe.stages import STAGES

_PAPERS_DOLLARS = "${}-{}".format(*PAPERS["dollars"])
_PAPERS_PRICES = "${:.3f} to ${:.3f}".format(*PAPERS_PRICES)
NO_GPU = "no commands: run.py refuses a model of this size without a GPU; --set model=tiny plans what it would train"
PAPERS_LINE = (
    f"The papers (HDM report, section 4): {PAPERS['hours']} h and {_PAPERS_DOLLARS} on {PAPERS['gpus']} x "
    f"{PAPERS['gpu']}, {_PAPERS_PRICES} a GPU hour."
)
_COLUMNS = {  # heading: key of a row; its unit, "count" or "%"
    "stage": ("name", ""), "images": ("images", "count"), "samples": ("samples", "count"), "epochs": ("epochs", 1),
    "images/s": ("images_per_second", 1), "speed is": ("source", ""),
    "computed": ("computed_images_per_second", 1), "of peak": ("share_of_peak", "%"),
    "hours": ("hours", 1), "$": ("dollars", 1), "kWh": ("kwh", 1), "pictures GB": ("pictures_bytes", 1e9),
    "checkpoints GB": ("checkpoints_bytes", 1e9), "read TB": ("read_bytes", 1e12), "MB/s": ("bytes_per_second", 1e6),
}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Our figures beside the papers' hours, without the columns that are empty in every row."""
    papers = {name: str(stage["hours"]) for name, stage in PAPERS["stages"].items()}
    if papers.keys() <= {row["name"] for row in rows}:
        papers["total"] = f"{PAPERS['hours']}, {_PAPERS_DOLLARS}"
    columns = [[head, *(_cell(row[key], unit) for row in rows)] for head, (key, unit) in _COLUMNS.items()]
    columns.append(["papers: h", *(papers.get(row["name"], "") for row in rows)])
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *others in zip(*columns, strict=True):
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(value: Any, unit: Any) -> str:
    """Text as it is; counts with k or M; other figures in their unit, with at least three digits."""
    if value is None or isinstance(value, str):
        return value or ""
    if unit == "%":
        return f"{value:.0%}"
    if unit == "count":
        letter, unit = ("M", 1e6) if value >= 1e6 else ("k", 1e3) if value >= 1e3 else ("", 1)
        return f"{value / unit:.4g}{letter}"
    value /= unit
    digits = ".0f" if value >= 100 else ".1f" if value >= 10 else ".2f" if value >= 0.1 else ".2g"
    return f"{value:,{digits}}"


def assumptions(
    job: Namespace, plan: Sequence[Row], setups: Sequence[StageSetup], machine: Machine, measured: Sequence[Row]
) -> Iterator[str]:
    yield "nothing is measured except what is called measured"
    yield from (f"measured: stage {row['stage']}, {row['remark']}" for row in measured)
    yield from (f"speed of {row['name']}: {row['source']}: {row['remark']}" for row in plan[:-1])
    if any(row["source"] == "scaled" for row in plan):
        yield "scaled: by operations (encoders as SDXL's VAE, Qwen3-0.6B), peak and number of GPUs, at equal efficiency"
    if plan[0]["computed_images_per_second"] is not None:
        shares = ", ".join(f"{part} {share:.0%}" for part, share in estimate.EFFICIENCY.items())
        yield (
            f"computed: images/s of this code if its operations run at assumed shares of the peak ({shares}); the "
            "hours do not depend on it"
        )
    if any(row["name"] == "1024" and "the papers'" in row["remark"] for row in plan):
        yield "the papers' 1024 stage counts as dense, as they say. Their code routes tokens: it may take longer"
    for source in dict.fromkeys(setup.text_source for setup in setups):
        tokens = ", ".join(f"{s.name} {s.text_tokens}" for s in setups if s.text_source == source)
        yield f"text tokens with padding: {tokens}: {source}"
    for setup in setups:
        if (line := memory_line(setup, machine)) is not None:
            yield line
    if machine.price is not None:
        middle = f", the middle of what the papers paid ({_PAPERS_PRICES})" if job.price is None else ""
        yield f"dollars: ${machine.price:.4g} a GPU hour{middle}"
    else:
        yield "dollars: not known; give the price of a GPU hour with --price"
    if machine.watts is not None:
        yield f"energy: {machine.watts:g} W for each GPU, all the time, and {estimate.HOST_WATTS} W for the rest"
    if job.dataset is not None:
        yield "images: sizes of the dataset's files; an epoch reads whole files, unselected rows too"
    else:
        small = f"{estimate.BYTES_PER_SMALL_IMAGE // 1000} kB up to {estimate.SMALL_SIDE} pixels (a smaller tier)"
        yield f"images: {estimate.BYTES_PER_IMAGE // 1000} kB each (the papers: 1.4 to 1.8 TB for 7.6M), {small}"
    yield (
        "checkpoints: 24 bytes a parameter, 16 with ema_snapshots=0; those kept by keep_last and keep_every, and one "
        "being written; 4 bytes a parameter for each of the ema_snapshots"
    )
    yield "not counted: setup, downloads, start of Ray, compiling, evaluation, waiting for data, repeated steps"


def memory_line(setup: StageSetup, machine: Machine) -> str | None:
    """What run.py is expected to fit into the GPU's memory; None if that is not known."""
    if machine.gigabytes is None:
        return None
    stage, available = setup.stage, machine.gigabytes * 2**30
    fit = memory.fitting(setup.model, stage, machine.count, setup.codec_factor, available)
    if fit is None:
        return f"stage {setup.name}: not even one sample fits into {machine.gigabytes} GB (an estimate)"
    needed = memory.training_bytes(
        setup.model, stage, fit.micro_batch, setup.codec_factor, checkpointing=fit.checkpointing
    )
    return (
        f"stage {setup.name}: run.py is expected to choose a micro batch of {fit.micro_batch} and to recompute "
        f"{fit.checkpointing} of the blocks, about {needed / 1e9:.0f} GB (an estimate)"
    )


def training_commands(setups: Sequence[StageSetup], machine: Machine, dataset: str | None) -> Iterator[str]:
    """A trainer/run.py command for each stage. Each starts from the weights of the stage planned before it. None for a
    CPU that would be refused."""
    before = None
    if machine.name.startswith("CPU") and any(setup.stage.model != "tiny" for setup in setups):
        return
    for setup in setups:
        stage = setup.stage
        words = ["python", "trainer/run.py", "--stage", setup.name, "--dataset", dataset or "ROOT", "--run", "RUN"]
        words += ["--workers", str(machine.count)]
        if stage.after not in (None, before):
            words += ["--from", f"RUN/{before}" if before else "FOLDER"]
        values = dict(setup.settings)
        if stage.samples != STAGES[setup.name].samples:
            values["samples"] = str(stage.samples)
        for name, value in values.items():
            words += ["--set", f"{name}={value}"]
        if machine.price is not None:
            words += ["--price-per-hour", f"{machine.count * machine.price:.4g}"]
        before = setup.name
        yield shlex.join(words)
