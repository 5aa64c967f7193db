"""FID and KID equal the closed forms for known distributions."""

import pytest
import torch

from trainer.evaluation.fidelity import fidelity


def normal(count: int, seed: int = 0) -> torch.Tensor:
    """Features whose mean is exactly 0 and whose covariance is exactly 1."""
    drawn_NC = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn_NC -= drawn_NC.mean(0)
    factor_CC = torch.linalg.cholesky(drawn_NC.T.cov())
    return torch.linalg.solve_triangular(factor_CC, drawn_NC.T, upper=False).T


def test_equal_features_have_distance_zero() -> None:
    found = fidelity(normal(300), normal(300))
    assert found.fid == pytest.approx(0, abs=1e-6)
    assert found.kid <= 0  # unbiased: pairs of a picture with itself are left out, so it may be below 0


def test_fid_of_a_moved_mean_is_the_square_of_its_distance() -> None:
    assert fidelity(normal(300), normal(300) + 0.5).fid == pytest.approx(8 * 0.5**2, rel=1e-6)


def test_fid_of_a_wider_spread_is_the_squared_difference_of_standard_deviations() -> None:
    assert fidelity(normal(300), 3 * normal(300)).fid == pytest.approx(8 * (3 - 1) ** 2, rel=1e-6)


def test_kid_of_all_pictures_is_the_mean_of_the_cubic_kernel() -> None:
    real_NC, drawn_NC = normal(20), normal(20, seed=1) + 1

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 8 + 1) ** 3

    def others(k_NN: torch.Tensor) -> torch.Tensor:
        return (k_NN.sum() - k_NN.diag().sum()) / (20 * 19)

    expected = others(kernel(real_NC, real_NC)) + others(kernel(drawn_NC, drawn_NC))
    expected -= 2 * kernel(real_NC, drawn_NC).mean()
    found = fidelity(real_NC, drawn_NC)
    assert found.kid == pytest.approx(float(expected), rel=1e-6)
    assert found.kid_spread == 0


def test_the_random_subsets_of_kid_are_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.evaluation.fidelity._KID_SUBSET_SIZE", 100)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = fidelity(normal(120), normal(110, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert fidelity(normal(120), normal(110, seed=1)) == first
    assert first.kid_spread > 0


def test_a_single_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pictures"):
        fidelity(normal(20), normal(20)[:1])
