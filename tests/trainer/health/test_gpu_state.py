"""GPU readings: units, GPUs that lack some of them, and machines without a driver."""

import logging
import sys

import pynvml
import pytest
import torch

from trainer.health.gpu_state import GpuReader, GpuState, gpu_metrics
from trainer.training.metrics import METRICS


def test_without_a_driver_nothing_is_reported_but_one_debug_line(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(pynvml.NVMLError):  # else this machine has a GPU
        pynvml.nvmlInit()
    with caplog.at_level(logging.DEBUG):
        reader = GpuReader("GPU-00000000-0000-0000-0000-000000000000")
        assert reader.read() == reader.read() == GpuState()
    [line] = caplog.records
    assert (line.levelno, "NVML" in line.message) == (logging.DEBUG, True)
    assert set(gpu_metrics([reader.read()]).values()) == {None}


def test_neither_a_gpu_nor_the_package_is_needed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.DEBUG):
        assert GpuReader.of(torch.device("cpu")).read() == GpuState()
        assert GpuReader("GPU-1").read() == GpuState()
    assert [line.levelno for line in caplog.records] == [logging.DEBUG] * 2


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> GpuReader:
    """A GeForce card: the library's functions answer in its units, and ECC is not supported."""

    def no_ecc(*_: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetClockInfo": lambda gpu, kind: {pynvml.NVML_CLOCK_SM: 2407, pynvml.NVML_CLOCK_MEM: 14001}[kind],
        "nvmlDeviceGetTemperature": lambda gpu, sensor: 71,
        "nvmlDeviceGetPowerUsage": lambda gpu: 431_250,  # milliwatts
        "nvmlDeviceGetMemoryInfo": lambda gpu: type("Memory", (), {"used": 30 << 30}),
        "nvmlDeviceGetTotalEccErrors": no_ecc,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    return GpuReader("GPU-1")


def test_readings_are_in_base_units(card: GpuReader) -> None:
    assert card.read() == GpuState(
        clock_hertz=2.407e9, memory_clock_hertz=14.001e9, celsius=71.0, watts=431.25, memory_used_bytes=30 * 2.0**30
    )


def test_a_gpu_that_is_lost_costs_only_the_readings(card: GpuReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", lost)
    assert card.read().celsius is None
    assert card.read().watts == 431.25


def test_a_metric_is_the_worst_reading_or_the_sum() -> None:
    cool = GpuState(2.4e9, 14e9, 60, 400, 20e9, 0, 0)
    hot = GpuState(1.2e9, 13e9, 88, 300, 25e9, 3, 1)
    metrics = gpu_metrics([cool, hot, GpuState()])
    assert list(metrics.values()) == [1.2e9, 13e9, 88, 700, 25e9, 3, 1]
    assert set(metrics) <= set(METRICS), "each has a unit and a gauge"
