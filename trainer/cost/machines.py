"""Known GPUs, and the figures of the HDM report that plans are scaled from."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.core.errors import UsageError
from trainer.training.metrics import peak_teraflops

# Name that torch reports; maximum board power in W, from NVIDIA's data sheets; memory in GB.
GPUS = {
    "RTX 3090": ("GeForce RTX 3090", 350, 24),
    "RTX A6000": ("RTX A6000", 300, 48),
    "RTX 4090": ("GeForce RTX 4090", 450, 24),
    "RTX 6000 Ada": ("RTX 6000 Ada Generation", 300, 48),
    "RTX 5090": ("GeForce RTX 5090", 575, 32),
    "RTX PRO 6000": ("RTX PRO 6000 Blackwell Workstation Edition", 600, 96),
    "A100": ("A100-SXM4-80GB", 400, 80),
    "L40S": ("L40S", 350, 48),
    "H100 PCIe": ("H100 PCIe", 350, 80),
    "H100 NVL": ("H100 NVL", 400, 94),
    "H100": ("H100 80GB HBM3", 700, 80),
    "H200": ("H200", 700, 141),
}
# HDM report, sections 4.2 and 4.3. The stages' samples are those of recipe.stages.STAGES; the dollars are rent.
PAPERS: dict[str, Any] = {
    "gpu": "RTX 5090",
    "gpus": 4,
    "hours": 385,
    "dollars": (535, 620),
    "stages": {
        "256": {"images": 7_624_000, "hours": 174},
        "512": {"images": 8_469_000, "hours": 120},
        "768": {"images": 8_469_000, "hours": 42},
        "1024": {"images": 3_649_000, "hours": 49},
    },
}
PAPERS_PRICES = [dollars / PAPERS["hours"] / PAPERS["gpus"] for dollars in PAPERS["dollars"]]  # of a GPU hour


@dataclass(frozen=True)
class Machine:
    """Figures of one GPU or CPU, except `count`; None if not known."""

    name: str
    count: int
    teraflops: float | None  # dense bfloat16 peak
    watts: float | None
    gigabytes: float | None
    price: float | None  # dollars per hour


def find_gpu(name: str) -> str | None:
    """The key in GPUS for a name given by a user or by torch, such as "rtx5090" or "NVIDIA GeForce RTX 5090"."""
    wanted = _normalized(name)
    return next((key for key, (device, *_) in GPUS.items() if wanted in (_normalized(key), _normalized(device))), None)


def _normalized(name: str) -> str:
    return "".join(name.lower().replace("nvidia", "").replace("geforce", "").split()).replace("-", "")


def gpu_peak(name: str) -> float | None:
    """TFLOP/s; None for a GPU that is not known, and for a CPU."""
    return peak_teraflops(GPUS[key][0] if (key := find_gpu(name)) else name)


def device_here() -> tuple[str, int]:
    """Name of the GPU, or of the CPU if there is none, and how many there are."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.device_count()
    return f"CPU of {torch.get_num_threads()} threads", 1


def planned_machine(job: Namespace) -> Machine:
    """Raises UsageError for an unknown GPU, a measurement that says nothing about it, or a budget without a price."""
    name, count = job.gpu or PAPERS["gpu"], PAPERS["gpus"]
    known = find_gpu(name)
    if job.measure is not None:
        here, count = device_here()
        if job.gpu and (not known or known != find_gpu(here)):  # a speed measured here is scaled to another GPU
            count = 1
            if gpu_peak(here) is None or not (known or job.teraflops):
                raise UsageError(f"--measure times {here}, which says nothing about --gpu {name}: leave out either")
        else:
            name, known = here, find_gpu(here)
    elif not known and (job.teraflops is None or job.watts is None):
        raise UsageError(f"--gpu {name} is not known: give --teraflops and --watts, or one of {', '.join(GPUS)}")
    price = sum(PAPERS_PRICES) / 2 if job.price is None and known == PAPERS["gpu"] else job.price
    if price is None and job.budget is not None:
        raise UsageError("--budget needs the price of a GPU hour: give --price")
    _, watts, gigabytes = GPUS[known] if known else (None, None, None)
    peak = job.teraflops or gpu_peak(name)
    return Machine(known or name, job.gpus or count, peak, job.watts or watts, gigabytes, price)
