"""Clocks, temperature, power, memory and ECC errors of a worker's GPU, by NVML. Only this file imports pynvml.

Without a driver, a GPU or the package nothing is reported, and a line of the level DEBUG says why.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuState:
    """Readings of one GPU at one moment. None: the GPU does not offer it, as GeForce cards do not count ECC errors."""

    clock_hertz: float | None = None  # of the multiprocessors
    memory_clock_hertz: float | None = None
    celsius: float | None = None
    watts: float | None = None
    memory_used_bytes: float | None = None  # in use by all processes
    corrected_errors: float | None = None  # of memory, by ECC, since the driver was loaded
    uncorrected_errors: float | None = None


class GpuReader:
    """Reads the GPU with this UUID, or nothing if that is not possible."""

    def __init__(self, uuid: str | None) -> None:
        self._nvml: Any = None
        if uuid is None:
            _LOG.debug("GPU readings: this process has no GPU")
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml
        except ImportError as error:
            _LOG.debug("GPU readings: %s", error)
        except pynvml.NVMLError as error:
            _LOG.debug("GPU readings: %s", error)

    @classmethod
    def of(cls, device: torch.device) -> "GpuReader":
        """The reader of a torch device."""
        if device.type != "cuda":
            return cls(None)
        return cls(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def read(self) -> GpuState:
        """The readings now; takes milliseconds at most."""
        nvml, read = self._nvml, self._value
        if nvml is None:
            return GpuState()
        return GpuState(
            clock_hertz=read(lambda gpu: 1e6 * nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            memory_clock_hertz=read(lambda gpu: 1e6 * nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
            celsius=read(lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
            watts=read(lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
            memory_used_bytes=read(lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used),
            corrected_errors=read(lambda gpu: self._errors(gpu, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED)),
            uncorrected_errors=read(lambda gpu: self._errors(gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)),
        )

    def _errors(self, gpu: Any, kind: int) -> int:
        count: int = self._nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, self._nvml.NVML_VOLATILE_ECC)
        return count

    def _value(self, ask: Callable[[Any], float]) -> float | None:
        """None if the GPU does not offer the reading, or is gone."""
        try:
            return float(ask(self._handle))
        except self._nvml.NVMLError:
            return None


def gpu_metrics(states: Sequence[GpuState]) -> dict[str, float | None]:
    """One value for all GPUs by name of the metric: that of the worst, or the sum of watts and errors."""
    found: dict[str, float | None] = {}
    for name, combine in _COMBINED.items():
        values = [value for state in states if (value := getattr(state, name)) is not None]
        found[f"gpu_{name}"] = combine(values) if values else None
    return found


_COMBINED: Final[dict[str, Callable[[list[float]], float]]] = {
    "clock_hertz": min,
    "memory_clock_hertz": min,
    "celsius": max,
    "watts": sum,
    "memory_used_bytes": max,
    "corrected_errors": sum,
    "uncorrected_errors": sum,
}
