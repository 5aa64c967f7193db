import math

import pytest
import torch

from trainer.optimization.outliers import LEAST_HISTORY, WINDOW, RecentNorms


def recent(*norms: float) -> RecentNorms:
    history = RecentNorms(torch.device("cpu"))
    for norm in norms:
        history.add(torch.tensor(norm))
    return history


def limit(history: RecentNorms, threshold: float = 6.0) -> float:
    return float(history.limit(threshold))


def test_the_limit_follows_its_formula_in_the_log_domain() -> None:
    # Logarithms -1, 0, 1 in turn: median 0, median absolute deviation 1 (two thirds deviate by 1).
    history = recent(*(math.exp(n % 3 - 1) for n in range(99)))
    assert limit(history, 2.0) == pytest.approx(math.exp(2 * 1.4826), rel=1e-4)
    scaled = recent(*(1000 * math.exp(n % 3 - 1) for n in range(99)))
    assert limit(scaled, 2.0) == pytest.approx(1000 * limit(history, 2.0), rel=1e-4), "a factor, at every scale"


def test_an_even_run_keeps_steps_below_1_8_times_the_median() -> None:
    assert limit(recent(*[2.0] * WINDOW)) == pytest.approx(2 * math.exp(0.6), rel=1e-4)


def test_there_is_no_limit_before_half_a_window_and_only_the_window_counts() -> None:
    assert limit(recent(*[1.0] * (LEAST_HISTORY - 1))) == math.inf
    assert limit(recent(*[1.0] * LEAST_HISTORY)) < 2
    assert limit(recent(*[1.0] * 500, *[50.0] * WINDOW)) == pytest.approx(50 * math.exp(0.6), rel=1e-4)


def test_spikes_do_not_hide_the_next_ones_and_non_finite_norms_are_not_kept() -> None:
    even = [1.0, 1.1, 0.9] * 40
    spiked = recent(*even, *[1e4] * 8)
    assert limit(spiked) == pytest.approx(limit(recent(*even)), rel=0.05)
    history = recent(*even, math.nan, math.inf)
    assert history.count == len(even)
    assert limit(history) == limit(recent(*even))


def test_normal_norms_are_hardly_ever_outliers_and_a_tenfold_one_always_is() -> None:
    generator = torch.Generator().manual_seed(0)
    history, found = RecentNorms(torch.device("cpu")), 0
    for _ in range(3000):
        norm = torch.exp(0.3 * torch.randn((), generator=generator))
        found += int(norm > history.limit(6.0))
        history.add(norm)
    assert found == 0
    assert limit(history) < 10


def test_a_changed_level_becomes_the_normal_one_after_half_a_window() -> None:
    history = recent(*[1.0] * WINDOW)
    added = 0
    while limit(history) < 20:
        history.add(torch.tensor(20.0))
        added += 1
    assert added == pytest.approx(WINDOW / 2, abs=1)
