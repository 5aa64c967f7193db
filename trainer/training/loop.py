"""The training step: torch only, no Ray, no files.

Axes: B batch, C latent channels, H W latent rows and columns, T text tokens, D text width, 4 = (x0, y0, width, height).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, distributed, nn

from trainer.diffusion.conditioning import aspect, crop_positions
from trainer.diffusion.flow import draw_noise, draw_times, flow_loss, interpolate, velocity_target
from trainer.model.xut import XUT, compiled
from trainer.optimization.optimizers import (
    OptimizerConfig,
    build_optimizer,
    learning_rate_factor,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    step_unless,
)
from trainer.runs.ema import EMA
from trainer.runs.trainable import learnt_state, load_learnt_state

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Inputs:
    """One micro batch of a worker's share of a global batch, encoded, on the device of the model."""

    latents_BCHW: Tensor
    text_BTD: Tensor
    text_mask_BT: Tensor  # True at real tokens
    frame_B4: Tensor  # where the crop lies in its picture, and the picture's size; pixels
    keys_B: Tensor  # int64: every random draw of a sample is a function of its key


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    resolution: int  # pixels: side of the crop
    batch_size: int  # samples of an optimizer step, summed over its micro batches and all workers
    selection_rate: float  # share of image tokens that TREAD routes around the middle blocks
    total_steps: int  # of the whole schedule, whatever part of it is run now
    ema_decay: float
    clip_norm: float  # of the whole gradient
    timestep_shift: float  # above 1 trains more often near pure noise
    optimizer: OptimizerConfig
    precision: Precision = "fp32"  # of the model's products; weights, gradients, moments and loss are float32 in both
    compile: bool = False  # the model, by torch.compile; worth its minutes on a GPU

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}: got {self.precision!r}")


@dataclass(frozen=True)
class StepResult:
    """Of one step, equal on all workers: 0-dim tensors on the device. Looking at one makes the host wait for it."""

    loss: Tensor  # mean over the global batch
    grad_norm: Tensor  # of the whole gradient, before it was clipped
    skipped: Tensor  # steps skipped so far in the whole run
    worst_run: Tensor  # the most steps skipped in a row since the last reading; a run that goes on counts whole


@dataclass(frozen=True)
class Reading:
    """What a line of a log says of the steps since the last reading, equal on all workers."""

    loss: float  # mean over the steps that were not skipped; nan where all were
    grad_norm: float  # likewise, before clipping
    learning_rate: float  # of the last step: AdamW's, at the base width
    skipped: int  # steps in the whole run
    worst_run: int  # the most of them in a row since the last reading


@dataclass(frozen=True)
class Tally:
    """What is counted on the device: 0-dim tensors. Every step makes new ones: results of earlier steps stay."""

    skipped: Tensor  # int64, in the whole run
    run: Tensor  # int64, skipped in a row up to now
    worst_run: Tensor  # int64, the longest of these since the last reading
    taken: Tensor  # int64, not skipped since the last reading
    loss_sum: Tensor  # float64, of those
    norm_sum: Tensor  # float64, of those

    @classmethod
    def of(cls, skipped: Tensor) -> "Tally":
        zero = torch.zeros_like(skipped)
        return cls(skipped, zero, zero, zero, zero.double(), zero.double())

    def after(self, loss: Tensor, grad_norm: Tensor, skip: Tensor) -> "Tally":
        run = (self.run + 1).masked_fill(~skip, 0)
        return Tally(
            skipped=self.skipped + skip,
            run=run,
            worst_run=torch.maximum(self.worst_run, run),
            taken=self.taken + ~skip,
            loss_sum=self.loss_sum + loss.double().masked_fill(skip, 0),
            norm_sum=self.norm_sum + grad_norm.double().masked_fill(skip, 0),
        )

    def read(self) -> "Tally":
        """The tally from which the steps after a reading go on: a run of skipped steps may go on too."""
        return replace(Tally.of(self.skipped), run=self.run)


class Loop:
    """A model in training: its weights, their moving average, the optimizer, and the number of steps taken.

    Every worker has one, with equal weights. Gradients and loss are summed over the workers once a step, as one tensor
    in the order of the parameters. DistributedDataParallel would start earlier, during the last backward pass (never
    in a compiled one, which gives all gradients at its end), but orders its buckets anew after the first step: with
    three workers or more sums round by their place in a bucket, and a resumed run would differ in the last bits.
    """

    def __init__(self, model: XUT, config: LoopConfig, loss_weight_C: Tensor) -> None:
        self.workers = distributed.get_world_size() if distributed.is_initialized() else 1
        if config.batch_size % self.workers:
            raise ValueError(
                f"a batch of {config.batch_size} does not divide into the shares of {self.workers} workers"
            )
        if self.workers > 1:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, src=0)
        self.config = config
        self.model = model
        self.loss_weight_C = loss_weight_C
        self.ema = EMA(model, config.ema_decay)
        self.optimizer = build_optimizer(model, config.optimizer)
        self.steps_taken = 0
        # Shares the model's parameters.
        self._forward: Callable[..., Tensor] = compiled(model) if config.compile else model
        self._tally = Tally.of(torch.zeros((), dtype=torch.int64, device=self.device))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def step(self, micro_batches: Iterable[Inputs]) -> StepResult:
        """One optimizer step on this worker's share of a global batch, in any number of parts of any size.

        Each part is asked for when the one before is done with, so an iterator that encodes them holds one at a time.
        If the loss or the gradient of any worker is not finite, no worker's weights, moments or averages change. That
        is decided on the device: the host does not wait for it. ValueError unless the parts make up the share.
        """
        set_learning_rate(self.optimizer, self._learning_rate_factor(self.steps_taken))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate(micro_batches)
        if self.workers > 1:
            _sum_over_workers([loss, *_gradients(self.model)])
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        skip = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        step_unless(skip, self.optimizer)
        self.ema.update(self.model, skip)
        self.steps_taken += 1
        self._tally = self._tally.after(loss, grad_norm, skip)
        return StepResult(loss, grad_norm, self._tally.skipped, self._tally.worst_run)

    def read(self) -> Reading:
        """The steps since the last reading. The one place where the host waits for the device: call it to log."""
        tally, self._tally = self._tally, self._tally.read()
        numbers = torch.stack([tally.loss_sum, tally.norm_sum, tally.taken, tally.skipped, tally.worst_run])
        loss_sum, norm_sum, taken, skipped, worst_run = numbers.tolist()
        factor = self._learning_rate_factor(max(0, self.steps_taken - 1))
        return Reading(
            loss=loss_sum / taken if taken else float("nan"),
            grad_norm=norm_sum / taken if taken else float("nan"),
            learning_rate=self.config.optimizer.learning_rate * factor,
            skipped=int(skipped),
            worst_run=int(worst_run),
        )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps beside `steps_taken`: model, ema, optimizer. Not copies: a step changes them.

        Of a model that is partly frozen, as one with adapters is, only what learns.
        """
        optimizer = optimizer_tensors(self.optimizer, self.model) | {_SKIPPED: self._tally.skipped}
        return {"model": learnt_state(self.model), "ema": self.ema.state_dict(), "optimizer": optimizer}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], steps_taken: int) -> None:
        """The inverse of `tensors`; what follows is then bit-equal on a CPU to never having stopped.

        Without "optimizer" that starts anew, and without "ema" the averages start at the loaded weights: for a stage
        that follows another. Raises ValueError for an optimizer or averages, RuntimeError for a model, of other shapes.
        """
        load_learnt_state(self.model, tensors["model"])
        if "ema" in tensors:
            self.ema.load_state_dict(dict(tensors["ema"]))
        else:
            self.ema = EMA(self.model, self.config.ema_decay)
        state = dict(tensors.get("optimizer", {}))
        skipped = state.pop(_SKIPPED, torch.zeros((), dtype=torch.int64))
        load_optimizer_tensors(self.optimizer, self.model, state)
        self._tally = Tally.of(skipped.to(self.device, copy=True))
        self.steps_taken = steps_taken

    def go_back(self, tensors: Mapping[str, Mapping[str, Tensor]], steps_taken: int) -> None:
        """`load` of an earlier state of this run. Steps that were skipped since then stay counted."""
        skipped = self._tally.skipped
        self.load(tensors, steps_taken)
        self._tally = Tally.of(skipped)

    @contextmanager
    def evaluation_model(self) -> Iterator[Callable[..., Tensor]]:
        """XUT's forward pass as in training (compiled, in its precision), with the averages for weights, no gradients.

        The weights come back at the end, also after an error.
        """
        with self.ema.applied(self.model), torch.no_grad():
            yield self._velocity

    def _learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(step, self.config.total_steps, self.config.optimizer)

    def _accumulate(self, micro_batches: Iterable[Inputs]) -> Tensor:
        """Backward passes of all parts. Returns this worker's part of the global batch's mean loss, detached."""
        share = self.config.batch_size // self.workers
        seen = 0
        total = torch.zeros((), device=self.device)
        for inputs in micro_batches:
            seen += len(inputs.keys_B)
            # Divided by the global batch and then summed: right whatever the sizes of the parts.
            loss = self._sample_losses(inputs).sum() / self.config.batch_size
            torch.autograd.backward(loss)
            total += loss.detach()
        if seen != share:
            raise ValueError(
                f"the micro batches of this worker have {seen} samples: its share of a batch of "
                f"{self.config.batch_size} on {self.workers} workers is {share}"
            )
        return total

    def _sample_losses(self, inputs: Inputs) -> Tensor:
        config = self.model.config
        x_BCHW = inputs.latents_BCHW.float()
        noise_BCHW = draw_noise(inputs.keys_B, x_BCHW.shape[1:])
        t_B = draw_times(inputs.keys_B, self.config.timestep_shift)
        velocity_BCHW = self._velocity(
            interpolate(x_BCHW, noise_BCHW, t_B),
            t_B,
            text=inputs.text_BTD,
            text_mask=inputs.text_mask_BT,
            position_map=crop_positions(config, inputs.frame_B4, self.config.resolution, x_BCHW.shape[-1]),
            aspect=aspect(config, inputs.frame_B4[:, 2], inputs.frame_B4[:, 3]),
            selection_rate=self.config.selection_rate,
            routing_key=inputs.keys_B,
        )
        return flow_loss(velocity_BCHW, velocity_target(x_BCHW, noise_BCHW), self.loss_weight_C)

    def _velocity(self, x_BCHW: Tensor, t_B: Tensor, *, text: Tensor, **inputs: Tensor | float | None) -> Tensor:
        """XUT's forward pass in the configured precision."""
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self._forward(x_BCHW, t_B, text=text if bf16 else text.float(), **inputs)


_SKIPPED = "skipped_steps"  # beside the optimizer's own tensors, whose names all have a dot


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _sum_over_workers(tensors: list[Tensor]) -> None:
    """In place. The flat copy is made when the activations of the backward pass are gone: peak memory stays."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
