"""Where the time of the training steps goes, in each worker, and which worker is slower than the others.

All times are seconds. On a GPU they are taken by events, which are read at log lines only: the host does not wait.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

_SLOW: Final = 1.3  # times the median of the other workers
_SLOW_STEPS: Final = 50  # for which a worker stays that slow before it is named


class Stopwatch:
    """Measures the time that a device spends inside `running`: on a CPU what passes, on a GPU its own time, which is
    short if the host waits there while the GPU still works on what came before."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: list[float] = []
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if not self._on_gpu:
            started = time.perf_counter()
            yield
            self._laps.append(time.perf_counter() - started)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._open.append((begin, end))

    def laps(self) -> list[float]:
        """The time of each block since the last call. Waits for unfinished work on the GPU."""
        for begin, end in self._open:
            end.synchronize()
            self._laps.append(begin.elapsed_time(end) / 1000)
        self._open.clear()
        laps, self._laps = self._laps, []
        return laps


@dataclass(frozen=True)
class RankTimes:
    """Medians over a worker's steps since the last log line."""

    step: float  # own work: encoders, forward and backward pass, optimizer; without waiting for data or other workers
    data_wait: float


class StepTimes:
    """The stopwatches of one worker. `data`, `step` and `sums` run once per step, `text` and `vae` per micro batch."""

    def __init__(self, device: torch.device) -> None:
        self.data = Stopwatch(device)  # waiting for the samples of a step
        self.step = Stopwatch(device)  # from the samples to the new weights
        self.text = Stopwatch(device)  # within a step, or an evaluation
        self.vae = Stopwatch(device)  # likewise
        self.sums = Stopwatch(device)  # within a step: gradients over the workers
        self._totals = dict.fromkeys(("waiting", "text", "vae", "model", "sums"), 0.0)
        self._own: list[float] = []
        self._waits: list[float] = []

    def totals(self) -> dict[str, float]:
        """Seconds so far by part of `metrics.Counts`. Waits for unfinished work on the GPU."""
        waits, steps, text, vae = (watch.laps() for watch in (self.data, self.step, self.text, self.vae))
        sums = self.sums.laps() or [0.0] * len(steps)  # a single worker sums nothing
        self._waits += waits
        self._own += [step - summing for step, summing in zip(steps, sums, strict=True)]
        parts = {"waiting": sum(waits), "text": sum(text), "vae": sum(vae), "sums": sum(sums)}
        parts["model"] = sum(steps) - parts["text"] - parts["vae"] - parts["sums"]
        self._totals = {name: seconds + parts[name] for name, seconds in self._totals.items()}
        return {f"{name}_seconds": seconds for name, seconds in self._totals.items()}

    def of_steps(self) -> RankTimes:
        """Medians over the steps in `totals` since the last call of `forget_steps`; 0 without any."""
        return RankTimes(statistics.median(self._own or [0.0]), statistics.median(self._waits or [0.0]))

    def forget_steps(self) -> None:
        self._own, self._waits = [], []


class SlowWorkers:
    """Finds workers that are slower than the others for many steps: in each step all wait for the slowest."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names`: the workers' devices, by rank."""
        self._names = names
        self._steps = [0] * len(names)  # for which each worker has been slow without interruption

    def update(self, seconds: Sequence[float], steps: int) -> list[str]:
        """`seconds`: median of each worker's own work over the last `steps` steps. Returns a message for each worker
        that has now been slow for long enough, and for each of these that is as fast as the others again."""
        messages = []
        for rank, own in enumerate(seconds):
            others = [*seconds[:rank], *seconds[rank + 1 :]]
            usual = statistics.median(others) if others else own
            before = self._steps[rank]
            self._steps[rank] = before + steps if own > _SLOW * usual else 0
            name = f"worker {rank} ({self._names[rank]})"
            if before < _SLOW_STEPS <= self._steps[rank]:
                messages.append(
                    f"{name} slows down all others: it takes {own:.3g} s per step, {own / usual:.1f} times as long as "
                    f"they do, for {self._steps[rank]} steps; is it hot, throttled, or busy with something else?"
                )
            elif before >= _SLOW_STEPS and not self._steps[rank]:
                messages.append(f"{name} is as fast as the others again")
        return messages


def device_name(device: torch.device, host: str) -> str:
    """The device as nvidia-smi lists it, and its node."""
    if device.type != "cuda":
        return f"CPUs of {host}"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, GPU-{found.uuid}, of {host}"
