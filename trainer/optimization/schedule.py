"""The learning rate as a function of the step. It depends on nothing else, so a resumed run has the same schedule.

cosine: linear warm-up, then a cosine to `final_ratio` at the last step. The best known end result for a length that is
fixed before the start, but the rate at every step depends on that length.

wsd: warm-up, stable, decay. After the warm-up the rate stays at its peak until the last `decay_share` of the steps, and
then falls as 1 - sqrt(progress), which Hägele et al. (arXiv 2405.18392) found better than a linear or cosine decay and
as good as a whole cosine from 20% on. Until the decay begins, nothing depends on the length: such a run can be
extended, or ended early by an anneal from any of its checkpoints.

An anneal decays from the rate that a checkpoint has reached to `final_ratio`, with the same curve.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from trainer.optimization.optimizers import OptimizerConfig


@dataclass(frozen=True)
class Anneal:
    """A decay from a checkpoint on."""

    start: int  # optimizer steps that the checkpoint has taken
    factor: float  # share of the peak rate that its next step would have had


@dataclass(frozen=True)
class Schedule:
    """Warm-up takes at most a tenth of the run."""

    config: OptimizerConfig
    steps: int  # total number of optimizer steps
    anneal: Anneal | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Schedule":
        """The schedule that a run's record (`Training.record`) was trained with."""
        anneal = record.get("anneal")
        return cls(
            OptimizerConfig(**record["stage"]["optimizer"]), record["steps"], Anneal(**anneal) if anneal else None
        )

    @property
    def decay_start(self) -> int:
        """First step of the decay of "wsd", counted from 0."""
        return max(self._warmup, self.steps - round(self.config.decay_share * self.steps))

    @property
    def _warmup(self) -> int:
        return min(self.config.warmup_steps, self.steps // 10)

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at update `step`, counted from 0."""
        if self.anneal:
            return self._decayed(self.anneal.factor, self.anneal.start, step)
        if step < self._warmup:
            return (step + 1) / (self._warmup + 1)
        if self.config.schedule == "wsd":
            return self._decayed(1.0, self.decay_start, step)
        progress = min(1.0, (step - self._warmup) / max(1, self.steps - 1 - self._warmup))
        final = self.config.final_ratio
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    def rate(self, step: int) -> float:
        """AdamW's learning rate at the base width."""
        return self.config.learning_rate * self.factor(step)

    def _decayed(self, before: float, start: int, step: int) -> float:
        """From `before` at all steps below `start` to `final_ratio` at the last one. Never rises."""
        if step < start:
            return before
        progress = min(1.0, (step - start + 1) / max(1, self.steps - start))
        return before - max(0.0, before - self.config.final_ratio) * math.sqrt(progress)


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Sets every group to `factor` times its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def change_of_length(before: Schedule, now: Schedule, step: int) -> str:
    """A line for a user who resumes at `step` with another number of steps: what happens to the learning rate."""
    was, rate = before.rate(step), now.rate(step)
    jump = f"stays at {rate:.3g}" if math.isclose(was, rate, rel_tol=1e-3) else f"jumps from {was:.3g} to {rate:.3g}"
    end = f"{now.rate(now.steps - 1):.3g} at step {now.steps}"
    if now.config.schedule == "wsd":
        course = f"it is {now.config.learning_rate:.3g} until step {now.decay_start}, then falls to {end}"
        course = course if step < now.decay_start else f"it falls to {end}"
    else:
        course = f"its cosine now ends with {end}, not at step {before.steps}"
    return f"the learning rate {jump} at step {step}: {course}"
