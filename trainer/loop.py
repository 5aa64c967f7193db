"""The training step: torch only, no Ray, no files.

Axes: B batch, C latent channels, H W latent rows and columns, T text tokens, D text width, 4 = (x0, y0, width, height).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.ema import EMA
from trainer.flow import draw_noise, draw_times, flow_loss, interpolate, velocity_target
from trainer.model.xut import XUT
from trainer.optim import OptimizerConfig, build_optimizer, learning_rate_factor, set_learning_rate
from trainer.positions import crop_position_map


@dataclass(frozen=True)
class Inputs:
    """One worker's share of a global batch, encoded, on the device of the model."""

    latents_BCHW: Tensor
    text_BTD: Tensor
    text_mask_BT: Tensor  # True at real tokens
    frame_B4: Tensor  # where the crop lies in its picture, and the picture's size; pixels
    keys_B: Tensor  # int64: every random draw of a sample is a function of its key


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    resolution: int  # pixels: side of the crop
    selection_rate: float  # share of image tokens that TREAD routes around the middle blocks
    total_steps: int  # of the whole schedule, whatever part of it is run now
    ema_decay: float
    clip_norm: float  # of the whole gradient
    timestep_shift: float  # above 1 trains more often near pure noise
    optimizer: OptimizerConfig


class Loop:
    """A model in training: its weights, their moving average, the optimizer, and the number of steps taken."""

    def __init__(self, model: XUT, config: LoopConfig, loss_weight_C: Tensor) -> None:
        self.config = config
        self.model = model
        self.loss_weight_C = loss_weight_C
        self.ema = EMA(model, config.ema_decay)
        self.optimizer = build_optimizer(model, config.optimizer)
        self.steps_taken = 0
        # The wrapper shares the model's parameters and averages gradients over the workers.
        distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        self._forward: nn.Module = DistributedDataParallel(model) if distributed else model

    def step(self, inputs: Inputs) -> Tensor:
        """One optimizer step; returns this worker's mean loss, detached and still on the device."""
        factor = learning_rate_factor(self.steps_taken, self.config.total_steps, self.config.optimizer)
        set_learning_rate(self.optimizer, factor)
        loss = self._loss(inputs)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.ema.update(self.model)
        self.steps_taken += 1
        return loss.detach()

    def _loss(self, inputs: Inputs) -> Tensor:
        x_BCHW = inputs.latents_BCHW
        noise_BCHW = draw_noise(inputs.keys_B, x_BCHW.shape[1:])
        t_B = draw_times(inputs.keys_B, self.config.timestep_shift)
        velocity_BCHW = self._forward(
            interpolate(x_BCHW, noise_BCHW, t_B),
            t_B,
            text=inputs.text_BTD,
            text_mask=inputs.text_mask_BT,
            position_map=self._position_map(inputs),
            aspect=torch.log(inputs.frame_B4[:, 2] / inputs.frame_B4[:, 3]),
            selection_rate=self.config.selection_rate,
            routing_key=inputs.keys_B,
        )
        target_BCHW = velocity_target(x_BCHW, noise_BCHW)
        return flow_loss(velocity_BCHW, target_BCHW, self.loss_weight_C).mean()

    def _position_map(self, inputs: Inputs) -> Tensor:
        x0_B, y0_B, width_B, height_B = inputs.frame_B4.unbind(1)
        grid = inputs.latents_BCHW.shape[-1] // self.model.config.patch_size
        return crop_position_map(x0_B, y0_B, self.config.resolution, width_B, height_B, grid)
