"""Axes: B batch, C channels, H W rows and columns."""

import numpy as np
import pytest
import torch

from trainer.diffusion.flow import (
    draw_noise,
    draw_times,
    flow_loss,
    interpolate,
    keyed_normal,
    shift_for_tokens,
    shift_time,
    velocity_target,
)
from trainer.diffusion.keyed_random import Stream, sample_key


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(sample_key(seed, 0, np.arange(count)))


def latents(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_path_runs_from_data_at_0_to_noise_at_1() -> None:
    x0, noise = latents(0), latents(1)
    torch.testing.assert_close(interpolate(x0, noise, torch.zeros(3)), x0)
    torch.testing.assert_close(interpolate(x0, noise, torch.ones(3)), noise)


def test_the_target_is_the_derivative_of_the_path() -> None:
    x0, noise, t = latents(0), latents(1), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    difference = (interpolate(x0, noise, t + 0.1) - interpolate(x0, noise, t)) / 0.1
    torch.testing.assert_close(difference, velocity_target(x0, noise))


def test_the_loss_is_each_samples_own_weighted_mean_square() -> None:
    velocity, target, weight = latents(0).float(), latents(1).float(), torch.tensor([0.5, 1.5, 2.0, 0.0])
    by_hand = [
        sum(float(w) * float(((v - u) ** 2).mean()) for v, u, w in zip(vs, us, weight, strict=True)) / 4
        for vs, us in zip(velocity, target, strict=True)
    ]
    torch.testing.assert_close(flow_loss(velocity, target, weight), torch.tensor(by_hand))
    torch.testing.assert_close(flow_loss(velocity, target), ((velocity - target) ** 2).mean((1, 2, 3)))


def test_the_loss_is_computed_in_fp32_from_bf16() -> None:
    ones = torch.ones(1, 1, 16, 16, dtype=torch.bfloat16)
    assert flow_loss(ones * 1.0078125, ones).item() == 0.0078125**2


def test_times_are_the_sigmoid_of_a_standard_normal() -> None:
    t = draw_times(keys(200_000)).double()
    assert ((t > 0) & (t < 1)).all()
    logit = torch.logit(t)
    assert abs(logit.mean()) < 0.01
    assert abs(logit.std() - 1) < 0.01


def test_a_shift_multiplies_the_odds_of_noise() -> None:
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * t / (1 - t))
    torch.testing.assert_close(shift_time(t, 1.0), t)
    torch.testing.assert_close(draw_times(keys(9), 3.0), shift_time(draw_times(keys(9)), 3.0))


def test_four_times_the_tokens_need_a_shift_of_two() -> None:
    assert shift_for_tokens(1024, 256) == 2
    assert shift_for_tokens(256, 256) == 1


def test_a_shift_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"time shift 0.*above 0"):
        shift_time(torch.ones(1), 0)


def test_normals_have_the_moments_of_a_standard_normal() -> None:
    x = keyed_normal(keys(2_000), (500,), Stream.NOISE).double()
    moments = [x.pow(k).mean().item() for k in (1, 2, 3, 4)]
    # Four standard errors of each moment over a million draws.
    np.testing.assert_array_less(np.abs(np.subtract(moments, [0, 1, 0, 3])), 4e-3 * np.sqrt([1, 2, 15, 96]))
    assert 4.5 < x.abs().max() < 6.8


@pytest.mark.parametrize("lag", [0, 1, 7])
def test_samples_streams_and_elements_are_uncorrelated(lag: int) -> None:
    noise = keyed_normal(keys(1_001), (1_000,), Stream.NOISE).double()
    time = keyed_normal(keys(1_001), (1_000,), Stream.TIME).double()
    n = 1_000 - lag
    pairs = {
        "neighbouring samples": (noise[:-1, :n], noise[1:, lag:]),
        "streams": (noise[:, :n], time[:, lag:]),
        "elements": (noise[:, :n - 1], noise[:, lag + 1:]),
    }  # fmt: skip
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean().item()) < 4.5 / a.numel() ** 0.5, name


@pytest.mark.parametrize("shape", [(), (5,), (4, 7, 9)])
def test_a_sample_draws_the_same_alone_and_in_a_batch(shape: tuple[int, ...]) -> None:
    batch = keys(37)
    together = keyed_normal(batch, shape, Stream.NOISE)
    assert together.shape == (37, *shape)
    alone = torch.cat([keyed_normal(batch[i : i + 1], shape, Stream.NOISE) for i in range(37)])
    assert torch.equal(together, alone)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keyed_normal(batch[order], shape, Stream.NOISE), together[order])


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw_noise(keys(4), (4, 8, 8))
    draw_times(keys(4))
    assert torch.equal(torch.get_rng_state(), before)
