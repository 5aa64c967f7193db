"""Hours, dollars, energy, disk space and reads of training stages, in closed form.

Hours follow from speeds that are the papers', measured or given, and scaled to other settings and GPUs. Scaling assumes
the same share of the GPU's peak (time is proportional to operations), and that N GPUs are N times as fast as one.
Beside them stands the speed by arithmetic, which assumes a share of the peak for each part of a step.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.errors import UsageError
from trainer.cost.dataset import selected_images
from trainer.cost.machines import PAPERS, Machine, gpu_peak
from trainer.cost.stage_setup import StageSetup, stage_setup
from trainer.recipe import memory
from trainer.recipe.stages import STAGES, StageConfig

Row = dict[str, Any]  # figures of a stage; None for one that is not known

BYTES_PER_IMAGE = round(1.6e12 / PAPERS["stages"]["256"]["images"])  # HDM report, section 4.3: 1.4 to 1.8 TB
SMALL_SIDE, BYTES_PER_SMALL_IMAGE = 512, 100_000  # a JPEG as `ingest.py --downsize 512` writes it
# Assumed shares of a GPU's peak for each part of a step: compiled matrix products and attention, convolutions, and a
# small language model in eager mode. Not measured.
EFFICIENCY = {"model": 0.6, "VAE": 0.4, "text encoder": 0.4}
HOST_WATTS = 250  # of the machine without its GPUs


def stage_images(job: Namespace, setup: StageSetup) -> Row:
    """Folder, number of images and bytes that a stage reads, by --images, else the dataset, else the papers."""
    name, count = setup.name, job.images.get(setup.name)
    if count is None and job.dataset is not None:
        return selected_images(job.dataset, setup.stage)
    if count is None and name not in PAPERS["stages"]:
        raise UsageError(f"how many images has stage {name}? Give --images {name}=N or --dataset")
    count = count or PAPERS["stages"][name]["images"]
    if setup.stage.resolution <= SMALL_SIDE:
        return {"folder": f"images-{SMALL_SIDE}", "images": count, "bytes": count * BYTES_PER_SMALL_IMAGE}
    return {"folder": "images", "images": count, "bytes": count * BYTES_PER_IMAGE}


def training_speed(setup: StageSetup, machine: Machine, given: Mapping[str, float], measured: Sequence[Row]) -> Row:
    """images_per_second of all GPUs, its source (given, measured, published or scaled) and how it is derived. measured:
    rows of `probe.measure`, of which the last one serves stages that were not measured."""
    name = setup.name
    if name in given:
        remark = f"--images-per-second {name}={given[name]:g}"
        return {"images_per_second": given[name], "source": "given", "remark": remark}
    if measured:
        base = next((row for row in measured if row["stage"] == name), measured[-1])
        of_stage = "" if base["stage"] == name else f" of stage {base['stage']}"
        remark = f"measured {base['images_per_second']:.3g} images/s{of_stage} on one {base['device']}"
        base = base | {"source": "measured", "remark": remark, "gpus": 1}
    elif name in PAPERS["stages"]:
        speed = STAGES[name].samples / PAPERS["stages"][name]["hours"] / 3600
        base = {"images_per_second": speed, "source": "published", "remark": f"the papers' {speed:.1f} images/s"}
        published = stage_setup(name, {}, PAPERS["gpus"])
        base |= {"gpus": PAPERS["gpus"], "peak": gpu_peak(PAPERS["gpu"]), "operations": published.total_operations}
    else:
        raise UsageError(f"stage {name} has no published speed; give --measure or --images-per-second {name}=F")
    before, after = base["operations"], setup.total_operations
    factors = {f"{machine.count}/{base['gpus']} GPUs": machine.count / base["gpus"]}
    if machine.teraflops and base["peak"]:
        factors[f"{machine.teraflops:g}/{base['peak']:g} TFLOP/s of peak"] = machine.teraflops / base["peak"]
    factors[f"{before / 1e12:.3g}/{after / 1e12:.3g} TFLOP an image"] = before / after
    changed = {words: factor for words, factor in factors.items() if not math.isclose(factor, 1)}
    return {
        "images_per_second": base["images_per_second"] * math.prod(factors.values()),
        "source": "scaled" if changed else base["source"],
        "remark": " x ".join([base["remark"], *changed]),
    }


def computed_speed(setup: StageSetup, machine: Machine) -> float | None:
    """Images per second of all GPUs by the step's arithmetic, the GPU's peak and EFFICIENCY; None without a peak.

    Blocks are recomputed only as far as the GPU's memory requires it, as run.py does.
    """
    if not machine.teraflops:
        return None
    fit = None
    if machine.gigabytes:
        available = machine.gigabytes * 2**30
        fit = memory.fitting(setup.model, setup.stage, machine.count, setup.codec_factor, available)
    operations = setup.operations(fit.checkpointing if fit else setup.checkpointing)
    seconds = sum(each / EFFICIENCY[part] for part, each in operations.items()) / (machine.teraflops * 1e12)
    return machine.count / seconds


def cost_plan(
    setups: Sequence[StageSetup], images: Sequence[Row], speeds: Sequence[Row], machine: Machine
) -> list[Row]:
    """A row for each stage, and their total as the last row."""
    rows = [stage_row(*parts, machine) for parts in zip(setups, images, speeds, strict=True)]
    folders: dict[str, float] = {}  # stages that read the same one share its disk space
    for read in images:
        folders[read["folder"]] = max(folders.get(read["folder"], 0), read["bytes"])
    total: Row = dict.fromkeys(rows[0]) | {"name": "total", "source": "", "remark": ""}
    for key in ("samples", "hours", "dollars", "kwh", "checkpoints_bytes", "read_bytes"):
        values = [row[key] for row in rows]
        total[key] = None if None in values else sum(values)
    return [*rows, total | {"pictures_bytes": sum(folders.values())}]


def stage_row(setup: StageSetup, images: Row, speed: Row, machine: Machine) -> Row:
    samples, rate = setup.stage.samples, speed["images_per_second"]
    hours, sample_bytes = samples / rate / 3600, images["bytes"] / images["images"]
    peak = machine.count * (machine.teraflops or 0) * 1e12
    watts = None if machine.watts is None else machine.count * machine.watts + HOST_WATTS
    return {
        "name": setup.name,
        "images": images["images"],
        "samples": samples,
        "epochs": samples / images["images"],
        "text_tokens": setup.text_tokens,
        **speed,
        "computed_images_per_second": computed_speed(setup, machine),
        "share_of_peak": rate * setup.total_operations / peak if peak else None,  # encoders included
        "hours": hours,
        "dollars": None if machine.price is None else hours * machine.count * machine.price,
        "kwh": None if watts is None else hours * watts / 1000,
        "pictures_bytes": images["bytes"],
        "checkpoints_bytes": checkpoint_bytes(setup.stage, memory.parameters(setup.model)),
        "read_bytes": samples * sample_bytes,
        "bytes_per_second": rate * sample_bytes,
    }


def checkpoint_bytes(stage: StageConfig, parameters: int) -> int:
    """Disk space of the checkpoints that a stage keeps and of one being written, and of its snapshots of averages.

    A checkpoint has weights, three averages and two moments, all fp32; matrices trained with Muon have one moment. A
    snapshot has two averages in fp16.
    """
    steps = stage.samples // stage.batch_size
    kept = stage.keep_last + 1 + (steps // stage.keep_every if stage.keep_every else 0)
    saved = min(kept, math.ceil(steps / stage.checkpoint_every) + 1)
    averages = len(stage.ema_lengths) if stage.ema_snapshots else 0
    return parameters * ((16 + 4 * averages) * saved + 2 * averages * stage.ema_snapshots)
