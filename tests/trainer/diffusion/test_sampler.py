"""Latents are (B, C, H, W)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.diffusion.flow import shift_time
from trainer.diffusion.positions import full_position_map
from trainer.diffusion.sampler import Velocity, euler, guided, guided_apart, heun, time_grid
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT

Integrate = Callable[..., Tensor]


def noise(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exponential(x: Tensor, t_B: Tensor) -> Tensor:
    """dx/dt = 2 t x, whose solution is x(t) = x(1) * exp(t^2 - 1)."""
    return 2 * t_B[:, None, None, None] * x


def error(integrate: Integrate, steps: int) -> float:
    return float((integrate(exponential, noise(), steps) - noise() * math.exp(-1)).abs().max())


@pytest.mark.parametrize("integrate", [euler, heun])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_straight_path_is_followed_exactly(integrate: Integrate, steps: int, shift: float) -> None:
    x0, start = noise(1), noise(2)
    torch.testing.assert_close(integrate(lambda x, t: start - x0, start, steps, shift), x0)


def test_euler_is_of_first_order_and_heun_of_second() -> None:
    assert math.log2(error(euler, 40) / error(euler, 80)) == pytest.approx(1, abs=0.05)
    assert math.log2(error(heun, 40) / error(heun, 80)) == pytest.approx(2, abs=0.05)


def test_times_fall_from_1_to_0_and_bend_as_training_times_do() -> None:
    assert time_grid(4) == [1, 0.75, 0.5, 0.25, 0]
    assert time_grid(2, start=0.5) == [0.5, 0.25, 0]
    shifted = time_grid(2, 3.0, start=0.6)
    assert shifted == pytest.approx([0.6, 0.375, 0]), "1/3, 1/6, 0 before the shift"
    for start in (0.0, 1.1):
        with pytest.raises(ValueError, match="first time"):
            time_grid(2, start=start)
    even = torch.tensor(time_grid(4), dtype=torch.float64)
    assert time_grid(4, 3.0) == pytest.approx(shift_time(even, 3.0).tolist())


@pytest.mark.parametrize(("integrate", "calls"), [(euler, [1, 0.5]), (heun, [1, 0.5, 0.5, 0])])
def test_the_velocity_is_asked_at_the_steps_ends(integrate: Integrate, calls: list[float]) -> None:
    asked: list[float] = []

    def velocity(x: Tensor, t_B: Tensor) -> Tensor:
        assert t_B.shape == (2,)
        asked.append(float(t_B[0]))
        return x

    integrate(velocity, noise(), 2)
    assert asked == calls


def test_every_step_is_reported() -> None:
    reports: list[tuple[int, int]] = []
    euler(exponential, noise(), 3, on_step=lambda done, total: reports.append((done, total)))
    assert reports == [(1, 3), (2, 3), (3, 3)]


def test_low_precision_noise_is_integrated_in_fp32() -> None:
    assert euler(exponential, noise().bfloat16(), 2).dtype == torch.float32


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="0 sampling steps"):
        euler(exponential, noise(), 0)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_guidance_goes_from_unconditional_through_conditional(guidance: float) -> None:
    x, t_B, sign_2B = noise(), torch.tensor([0.3, 0.3]), torch.tensor([1.0, 1.0, -2.0, -2.0])

    def both(x2: Tensor, t_2B: Tensor) -> Tensor:
        assert t_2B.tolist() == [pytest.approx(0.3)] * 4
        return sign_2B[:, None, None, None] * x2

    velocity: Velocity = guided(both, guidance)
    torch.testing.assert_close(velocity(x, t_B), -2 * x + guidance * (x - -2 * x))


def test_two_branches_of_different_selection_rates_are_guided_as_one_batch_would_be() -> None:
    """TREAD's self-guidance: with different rates the branches cannot share a pass; with equal ones they can."""
    config = XUTConfig(dim=32, heads=2, mlp_dim=32, depth=1, in_channels=2, text_dim=4)
    torch.manual_seed(0)
    model = XUT(config)
    torch.nn.init.normal_(model.patch_out.weight)
    start, text, keys_B = noise()[:, :2, :, :4].float(), torch.randn(2, 3, 4), torch.arange(2)
    map_2N2 = full_position_map(32, 32, 2, 2).expand(2, -1, -1)

    def branch(text: Tensor, rate: float) -> Velocity:
        return lambda x, t: model(x, t, text=text, position_map=map_2N2, selection_rate=rate, routing_key=keys_B)

    def both_branches(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, text=torch.cat([text, 0 * text]), position_map=torch.cat([map_2N2, map_2N2]))

    together = guided(both_branches, 3.0)(start, torch.full((2,), 0.5))
    apart = guided_apart(branch(text, 0.0), branch(0 * text, 0.0), 3.0)(start, torch.full((2,), 0.5))
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)
    routed = guided_apart(branch(text, 0.0), branch(0 * text, 0.5), 3.0)(start, torch.full((2,), 0.5))
    assert not torch.allclose(routed, together, atol=1e-3)
