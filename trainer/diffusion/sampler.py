"""From noise to a picture: integration of a velocity function from t = 1 to t = 0, and guidance.

Legend: B batch; latents are (B, C, H, W). A velocity function takes latents and t_B and gives d x / d t.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.diffusion.flow import shift_time

Velocity = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, int], None]  # steps done, steps in all


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 1 (noise) down to 0 (data), evenly spaced before the shift of `flow.shift_time`."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: at least 1 is needed")
    times = shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    return [float(t) for t in times]


@torch.no_grad()
def euler(velocity: Velocity, start: Tensor, steps: int, shift: float = 1.0, on_step: OnStep | None = None) -> Tensor:
    """Latents at t = 0 from those at t = 1; one call of `velocity` a step. Exact where the velocity is constant."""
    x, times = _precise(start), time_grid(steps, shift)
    for i in range(steps):
        x = x + (times[i + 1] - times[i]) * velocity(x, _everywhere(times[i], x))
        if on_step is not None:
            on_step(i + 1, steps)
    return x


@torch.no_grad()
def heun(velocity: Velocity, start: Tensor, steps: int, shift: float = 1.0, on_step: OnStep | None = None) -> Tensor:
    """As `euler`, but second order: each step takes the mean of the velocities at its two ends (two calls)."""
    x, times = _precise(start), time_grid(steps, shift)
    for i in range(steps):
        step = times[i + 1] - times[i]
        begin = velocity(x, _everywhere(times[i], x))
        end = velocity(x + step * begin, _everywhere(times[i + 1], x))
        x = x + step * (begin + end) / 2
        if on_step is not None:
            on_step(i + 1, steps)
    return x


def guided(velocity: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + guidance * (conditional - unconditional).

    `velocity` is called with the latents twice over, (2B, C, H, W), and must know the prompts for the first half and
    the negative prompts for the second. Guidance 1 gives the conditional velocity, 0 the unconditional one.
    """

    def velocity_with_guidance(x: Tensor, t_B: Tensor) -> Tensor:
        conditional, unconditional = velocity(torch.cat([x, x]), torch.cat([t_B, t_B])).chunk(2)
        return torch.lerp(unconditional, conditional, guidance)

    return velocity_with_guidance


def guided_apart(conditional: Velocity, unconditional: Velocity, guidance: float) -> Velocity:
    """The same guidance over two functions, called one after the other: they may differ in more than the prompt.

    With the negative prompt and a higher TREAD selection rate in the second one it is TREAD's self-guidance (arXiv
    2501.04765): away from what the model says with fewer tokens.
    """

    def velocity_with_guidance(x: Tensor, t_B: Tensor) -> Tensor:
        return torch.lerp(unconditional(x, t_B), conditional(x, t_B), guidance)

    return velocity_with_guidance


def _precise(x: Tensor) -> Tensor:
    """At least fp32: in bf16 the small steps of a long schedule would round away."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _everywhere(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)
