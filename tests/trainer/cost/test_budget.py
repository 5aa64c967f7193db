"""How a budget is divided among the stages."""

import pytest

from pipeline.core.errors import UsageError
from trainer.cost.budget import LATER_FLOOR, LEAST, affordable

COSTS = {"256": 200.0, "512": 100.0, "768": 80.0, "1024": 60.0}


def spent(shares: dict[str, float]) -> float:
    return sum(share * COSTS[name] for name, share in shares.items())


def test_a_sufficient_budget_leaves_every_stage_whole() -> None:
    assert set(affordable(COSTS, sum(COSTS.values())).values()) == {1.0}


def test_the_last_stage_is_shortened_first() -> None:
    assert affordable(COSTS, 410) == {"256": 1, "512": 1, "768": 1, "1024": 0.5}
    shares = affordable(COSTS, 375)
    assert shares == {"256": 1, "512": 1, "768": pytest.approx(0.75), "1024": LATER_FLOOR}


def test_below_the_floors_all_stages_are_shortened_in_proportion() -> None:
    floor = 200 + LATER_FLOOR * 240
    shares = affordable(COSTS, 0.8 * floor)
    assert shares["256"] == pytest.approx(0.8)
    assert shares["512"] == shares["768"] == shares["1024"] == pytest.approx(0.8 * LATER_FLOOR)


@pytest.mark.parametrize("budget", range(140, 440, 37))
def test_exactly_the_budget_is_spent(budget: int) -> None:
    assert spent(affordable(COSTS, budget)) == pytest.approx(budget)


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_one() -> None:
    least = LEAST * (200 + LATER_FLOOR * 240)
    with pytest.raises(UsageError, match=rf"\${least:.0f}"):
        affordable(COSTS, least - 1)
    assert spent(affordable(COSTS, least)) == pytest.approx(least)
