"""What a stage costs, in closed form: arithmetic, speed, hours, dollars, energy, disk, bandwidth. Pure.

Two things are taken for facts: how fast the papers' machine was, or the machine at hand is, at some settings. All else
is scaled from there: with the same share of the GPU's peak, time goes with the arithmetic of the model's step, of what
checkpointing computes again, and of the frozen encoders. Operations are floating-point ones of matrix products and
convolutions, of one sample.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from trainer.model.flops import products
from trainer.model.xut import XUTConfig
from trainer.recipe.stages import STAGES, StageConfig
from trainer.training.metrics import peak_teraflops

# --- Machines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    device: str  # what torch calls it: the key of metrics.peak_teraflops
    watts: float  # of the whole board, at most: NVIDIA's data sheets
    gigabytes: float  # of memory


GPUS = {
    "RTX 3090": Gpu("GeForce RTX 3090", 350, 24),
    "RTX A6000": Gpu("RTX A6000", 300, 48),
    "RTX 4090": Gpu("GeForce RTX 4090", 450, 24),
    "RTX 6000 Ada": Gpu("RTX 6000 Ada Generation", 300, 48),
    "RTX 5090": Gpu("GeForce RTX 5090", 575, 32),
    "RTX PRO 6000": Gpu("RTX PRO 6000 Blackwell Workstation Edition", 600, 96),
    "A100": Gpu("A100-SXM4-80GB", 400, 80),
    "L40S": Gpu("L40S", 350, 48),
    "H100 PCIe": Gpu("H100 PCIe", 350, 80),
    "H100 NVL": Gpu("H100 NVL", 400, 94),
    "H100": Gpu("H100 80GB HBM3", 700, 80),
    "H200": Gpu("H200", 700, 141),
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Of one GPU, or of the CPU, but for `count`; None: not known."""

    name: str
    count: int
    teraflops: float | None  # dense bfloat16 peak
    watts: float | None
    gigabytes: float | None
    price: float | None  # dollars an hour


def find_gpu(kind: str) -> str | None:
    """The name in GPUS of what a user or torch calls it, as "rtx5090" or "NVIDIA GeForce RTX 5090"."""
    wanted = _squeezed(kind)
    return next((name for name, gpu in GPUS.items() if wanted in (_squeezed(name), _squeezed(gpu.device))), None)


def _squeezed(kind: str) -> str:
    return "".join(kind.lower().replace("nvidia", "").replace("geforce", "").split()).replace("-", "")


def gpu_peak(kind: str) -> float:
    """TFLOP/s of a GPU of GPUS."""
    peak = peak_teraflops(GPUS[kind].device)
    assert peak is not None, kind
    return peak


# --- The papers' row --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """One stage of the HDM report, section 4.2; its samples are those of STAGES."""

    images: int
    hours: int  # of wall time, all four GPUs at it

    def speed(self, stage: str) -> float:
        """Images a second of all four GPUs."""
        return STAGES[stage].samples / self.hours / 3600


PUBLISHED = {
    "256": Published(images=7_624_000, hours=174),
    "512": Published(images=8_469_000, hours=120),
    "768": Published(images=8_469_000, hours=42),
    "1024": Published(images=3_649_000, hours=49),
}
PUBLISHED_GPU, PUBLISHED_GPUS = "RTX 5090", 4
PUBLISHED_HOURS = sum(row.hours for row in PUBLISHED.values())
PUBLISHED_DOLLARS = (535, 620)  # section 4.3: of 385 hours of four rented GPUs
# What one of them cost an hour.
PUBLISHED_PRICES = tuple(dollars / PUBLISHED_HOURS / PUBLISHED_GPUS for dollars in PUBLISHED_DOLLARS)

# Section 4.3: 1.4 to 1.8 TB for the first stage's pictures.
BYTES_OF_A_PICTURE = round(1.6e12 / PUBLISHED["256"].images)
# A JPEG of 512 pixels along the short side, as `ingest.py --downsize 512` writes it.
BYTES_OF_A_SMALL_PICTURE = 100_000
SMALL_SIDE = 512


# --- Arithmetic -------------------------------------------------------------------------------------------------------

# Multiplications and additions of SDXL's image encoder for a pixel, and its one attention, over tokens of 64 pixels;
# 4 n^2 512 operations. What `torch.utils.flop_counter` counts at 256, 512 and 1024 pixels is within 0.01%.
_VAE_OF_A_PIXEL, _VAE_OF_PIXELS_SQUARED = 4_128_642, 0.5
# Qwen3-0.6B: 28 layers without the vocabulary, and their attention of 16 heads of 128; as counted.
_QWEN_OF_A_TOKEN, _QWEN_OF_TOKENS_SQUARED = 880_803_840, 28 * 4 * 16 * 128
EMBEDDED_CODECS, EMBEDDED_ENCODER = ("dct", "pixel"), "local"  # nothing beside the model
_RECOMPUTED = {"none": 0.0, "blocks": 0.5, "all": 1.0}  # of the forward pass, by StageConfig.checkpointing


@dataclass(frozen=True)
class Work:
    """Operations of one sample of training."""

    model: float  # forward and backward, what is computed again included
    image_encoder: float
    text_encoder: float

    @property
    def total(self) -> float:
        return self.model + self.image_encoder + self.text_encoder


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A stage as it is to be trained."""

    name: str
    stage: StageConfig
    model: XUTConfig
    codec_factor: int  # pixels along the side of a latent
    text_tokens: int  # of a padded text, on average over the micro batches

    @property
    def work(self) -> Work:
        """Encoders that are not the embedded ones are taken for SDXL's VAE and Qwen3-0.6B."""
        stage, tokens = self.stage, self.text_tokens
        image_tokens = (stage.resolution // self.codec_factor // self.model.patch_size) ** 2
        step = products(self.model, image_tokens, tokens, stage.selection_rate)
        pixels = stage.resolution**2
        image = _VAE_OF_A_PIXEL * pixels + _VAE_OF_PIXELS_SQUARED * pixels**2
        text = _QWEN_OF_A_TOKEN * tokens + _QWEN_OF_TOKENS_SQUARED * tokens**2
        return Work(
            model=step.step + _RECOMPUTED[stage.checkpointing] * step.tokens,
            image_encoder=0 if stage.codec in EMBEDDED_CODECS else image,
            text_encoder=0 if stage.text_encoder == EMBEDDED_ENCODER else text,
        )


def published_setting(name: str) -> Setting:
    """A stage of the papers: texts padded to the full length."""
    stage = STAGES[name]
    return Setting(
        name=name, stage=stage, model=XUTConfig.base(), codec_factor=8, text_tokens=stage.text_tokens
    )  # fmt: skip


def padded_tokens(lengths: Mapping[int, float], longest: int, multiple: int, micro_batch: int) -> int:
    """How long the texts of a micro batch are on average when they are padded to the longest of them, rounded up to a
    multiple, and `longest` at most.

    `lengths`: tokens of a text -> how many texts. The longest of m independent draws is at most v with the m-th power
    of the share of texts that are.
    """
    counts: dict[int, float] = {}
    for length, count in lengths.items():
        padded = min(longest, math.ceil(max(1, length) / multiple) * multiple)
        counts[padded] = counts.get(padded, 0) + count
    total = sum(counts.values())
    mean = below = seen = 0.0
    for padded in sorted(counts):
        seen += counts[padded]
        at_most = (seen / total) ** micro_batch
        mean += padded * (at_most - below)
        below = at_most
    return round(mean)


# --- Speeds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    images_per_second: float  # of all GPUs together
    source: str  # published | measured | given | scaled
    remark: str  # how it comes about


def published_speed(setting: Setting, machine: Machine) -> Speed | None:
    """The papers' speed of this stage, scaled to these settings and GPUs; None for a stage that they do not have."""
    if setting.name not in PUBLISHED:
        return None
    assert machine.teraflops is not None
    before, base = published_setting(setting.name).work.total, PUBLISHED[setting.name].speed(setting.name)
    factors = {
        f"{machine.count}/{PUBLISHED_GPUS} GPUs": machine.count / PUBLISHED_GPUS,
        f"{machine.teraflops:g}/{gpu_peak(PUBLISHED_GPU):g} TFLOP/s of peak": machine.teraflops
        / gpu_peak(PUBLISHED_GPU),
        f"{before / 1e12:.2f}/{setting.work.total / 1e12:.2f} TFLOP an image": before / setting.work.total,
    }
    scaled = {words: factor for words, factor in factors.items() if not math.isclose(factor, 1)}
    remark = " x ".join([f"the papers' {base:.1f} images/s", *scaled])
    return Speed(base * math.prod(factors.values()), "scaled" if scaled else "published", remark)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a probe found, on one device."""

    setting: Setting  # with the micro batch and the encoders that it ran with
    device: str
    peak_teraflops: float | None
    encoders: str  # which they were
    steps: int
    seconds: float
    memory_bytes: int | None  # at most, of tensors on a GPU

    @property
    def images_per_second(self) -> float:
        return self.steps * self.setting.stage.micro_batch / self.seconds

    @property
    def operations_per_second(self) -> float:
        return self.images_per_second * self.setting.work.total


def measured_speed(setting: Setting, machine: Machine, measured: Sequence[Measured]) -> Speed:
    """From the probe of this stage, or else of the last one that could be probed; scaled to these settings and GPUs."""
    probe = next((found for found in measured if found.setting.name == setting.name), measured[-1])
    factors = {f"{machine.count} GPUs": float(machine.count)}
    if machine.teraflops and probe.peak_teraflops:
        words = f"{machine.teraflops:g}/{probe.peak_teraflops:g} TFLOP/s of peak"
        factors[words] = machine.teraflops / probe.peak_teraflops
    ours, theirs = setting.work.total, probe.setting.work.total
    factors[f"{theirs / 1e12:.3g}/{ours / 1e12:.3g} TFLOP an image"] = theirs / ours
    scaled = {words: factor for words, factor in factors.items() if not math.isclose(factor, 1)}
    stage = "" if probe.setting.name == setting.name else f" of stage {probe.setting.name}"
    remark = " x ".join([f"measured {probe.images_per_second:.3g} images/s{stage} on one {probe.device}", *scaled])
    return Speed(
        probe.images_per_second * math.prod(factors.values()), "scaled" if scaled else "measured", remark
    )  # fmt: skip


# --- Costs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """What a stage reads."""

    folder: str  # stages that read the same one share its disk
    images: int  # that are selected
    stored_bytes: float  # of the folder
    sample_bytes: float  # read for one sample: row groups are read whole, with rows that are not selected


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a plan, or its last. None: not known, or without meaning."""

    name: str
    images: int | None = None
    samples: int | None = None
    text_tokens: int | None = None
    images_per_second: float | None = None
    source: str = ""
    remark: str = ""
    share_of_peak: float | None = None  # of the arithmetic counted here, encoders included
    hours: float = 0
    dollars: float | None = None
    kwh: float | None = None
    energy_dollars: float | None = None
    pictures_bytes: float = 0  # on disk
    checkpoints_bytes: float = 0  # on disk
    read_bytes: float = 0  # over the whole stage
    bytes_per_second: float | None = None  # read

    @property
    def epochs(self) -> float | None:
        return self.samples / self.images if self.samples and self.images else None

    def record(self) -> dict[str, object]:
        return asdict(self) | {"epochs": self.epochs}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What hours are turned into."""

    machine: Machine
    host_watts: float  # of everything but the GPUs
    dollars_per_kwh: float | None

    def costs(self, hours: float) -> dict[str, float | None]:
        machine = self.machine
        kwh = None if machine.watts is None else hours * (machine.count * machine.watts + self.host_watts) / 1000
        return {
            "hours": hours,
            "dollars": None if machine.price is None else hours * machine.count * machine.price,
            "kwh": kwh,
            "energy_dollars": None if kwh is None or self.dollars_per_kwh is None else kwh * self.dollars_per_kwh,
        }


def stage_row(setting: Setting, pictures: Pictures, speed: Speed, rates: Rates, parameters: int) -> Row:
    """A stage's costs; `parameters` are the model's."""
    stage, machine = setting.stage, rates.machine
    seconds = stage.samples / speed.images_per_second
    peak = None if machine.teraflops is None else machine.count * machine.teraflops * 1e12
    costs = rates.costs(seconds / 3600)
    return Row(
        name=setting.name,
        images=pictures.images,
        samples=stage.samples,
        text_tokens=setting.text_tokens,
        images_per_second=speed.images_per_second,
        source=speed.source,
        remark=speed.remark,
        share_of_peak=None if peak is None else speed.images_per_second * setting.work.total / peak,
        pictures_bytes=pictures.stored_bytes,
        checkpoints_bytes=checkpoint_bytes(stage, parameters),
        read_bytes=stage.samples * pictures.sample_bytes,
        bytes_per_second=speed.images_per_second * pictures.sample_bytes,
        **costs,  # type: ignore[arg-type]
    )


def caption_row(captions_per_second: float, pictures: Pictures, rates: Rates) -> Row:
    """Captions of these pictures, once each."""
    seconds = pictures.images / captions_per_second
    size = pictures.stored_bytes / max(1, pictures.images)
    costs = rates.costs(seconds / 3600)
    return Row(
        name="captions",
        images=pictures.images,
        images_per_second=captions_per_second,
        source="given",
        remark=f"--captions-per-second {captions_per_second:g}",
        read_bytes=pictures.stored_bytes,
        bytes_per_second=captions_per_second * size,
        **costs,  # type: ignore[arg-type]
    )


def total_row(rows: Iterable[Row], folders: Mapping[str, float]) -> Row:
    """Of all rows; `folders` of pictures, by name, lie on the disk once."""
    rows = list(rows)

    def summed(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    return Row(
        name="total",
        samples=sum(row.samples or 0 for row in rows),
        hours=sum(row.hours for row in rows),
        dollars=summed([row.dollars for row in rows]),
        kwh=summed([row.kwh for row in rows]),
        energy_dollars=summed([row.energy_dollars for row in rows]),
        pictures_bytes=sum(folders.values()),
        checkpoints_bytes=sum(row.checkpoints_bytes for row in rows),
        read_bytes=sum(row.read_bytes for row in rows),
    )


def checkpoint_bytes(stage: StageConfig, parameters: int) -> int:
    """Of all that a stage leaves, and one that is being written: weights, averages and two moments in fp32 (Muon's
    matrices have one)."""
    steps = stage.samples // stage.batch_size
    saved = math.ceil(steps / stage.checkpoint_every)
    kept = stage.keep_last + 1 + (steps // stage.keep_every if stage.keep_every else 0)
    return 16 * parameters * min(kept, saved + 1)
