"""Sampling: integrates a velocity function from noise (t = 1) to data (t = 0), with classifier-free guidance.

Axes: B batch; latents are (B, C, H, W). A velocity function maps latents and t_B to dx / dt.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from trainer.diffusion.flow import shift_time

Velocity = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, int], None]  # called with the number of steps done and the total


def time_grid(steps: int, shift: float = 1.0, start: float = 1.0) -> list[float]:
    """steps + 1 times from `start` (1 is noise) down to 0 (data), evenly spaced before `flow.shift_time`."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: at least 1 is needed")
    if not 0 < start <= 1:
        raise ValueError(f"the first time {start} must be above 0 and at most 1")
    unshifted = start / (shift - (shift - 1) * start)  # its shift_time is `start`
    times = shift_time(torch.linspace(unshifted, 0, steps + 1, dtype=torch.float64), shift)
    return [float(t) for t in times]


def euler(
    velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, on_step: OnStep | None = None, start: float = 1.0
) -> Tensor:
    """Latents at t = 0 from those at t = `start`, at one velocity call per step. Exact if the velocity is constant."""
    return _integrate(velocity, x, time_grid(steps, shift, start), on_step, second_order=False)


def heun(
    velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, on_step: OnStep | None = None, start: float = 1.0
) -> Tensor:
    """Like `euler`, but of second order: a step averages the velocities at its two ends, which takes two calls."""
    return _integrate(velocity, x, time_grid(steps, shift, start), on_step, second_order=True)


@torch.no_grad()
def _integrate(velocity: Velocity, x: Tensor, times: list[float], on_step: OnStep | None, second_order: bool) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 would round away small steps
    for i, (t, next_t) in enumerate(itertools.pairwise(times)):
        step, slope = next_t - t, velocity(x, x.new_full((len(x),), t))
        if second_order:
            slope = (slope + velocity(x + step * slope, x.new_full((len(x),), next_t))) / 2
        x = x + step * slope
        if on_step is not None:
            on_step(i + 1, len(times) - 1)
    return x


def guided(velocity: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + guidance * (conditional - unconditional).

    `velocity` is called with the latents twice, (2B, C, H, W), and must apply the prompts to the first half and the
    negative prompts to the second. Guidance 1 is the conditional velocity, 0 the unconditional one.
    """

    def velocity_with_guidance(x: Tensor, t_B: Tensor) -> Tensor:
        conditional, unconditional = velocity(torch.cat([x, x]), torch.cat([t_B, t_B])).chunk(2)
        return torch.lerp(unconditional, conditional, guidance)

    return velocity_with_guidance


def guided_apart(conditional: Velocity, unconditional: Velocity, guidance: float) -> Velocity:
    """The same guidance with two velocity functions, called in turn, which may differ in more than the prompt.

    With a higher TREAD selection rate in the unconditional one it is TREAD's self-guidance (arXiv 2501.04765), which
    moves away from what the model predicts with fewer tokens.
    """

    def velocity_with_guidance(x: Tensor, t_B: Tensor) -> Tensor:
        return torch.lerp(unconditional(x, t_B), conditional(x, t_B), guidance)

    return velocity_with_guidance
