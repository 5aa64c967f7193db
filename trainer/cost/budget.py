"""A recipe that costs too much -> what share of each stage's samples a budget buys. Pure."""

import math
from collections.abc import Mapping

# The first stage learns what things look like; later ones, at higher resolution, learn detail from it and cost more a
# sample. What a stage needs at least is a judgement of ours, and no measurement.
LATER_FLOOR = 0.25  # of a later stage's samples, before any of the first stage is given up
LEAST = 0.5  # of what is left then, of every stage

RULE = (
    f"later stages are shortened first, the last one before the others, each down to {LATER_FLOOR:.0%} of its samples; "
    f"then all stages in proportion, down to {LEAST:.0%} of that"
)


def affordable(dollars: Mapping[str, float], budget: float) -> dict[str, float]:
    """The share of each stage's samples, in (0, 1], that together cost at most `budget`; `dollars` of the whole stages,
    in training order.

    ValueError, which names the least sensible budget, below that.
    """
    shares = dict.fromkeys(dollars, 1.0)
    excess = sum(dollars.values()) - budget
    for name in list(dollars)[:0:-1]:
        saved = min(max(0.0, excess), dollars[name] * (1 - LATER_FLOOR))
        if saved:
            shares[name] = 1 - saved / dollars[name]
            excess -= saved
    left = sum(shares[name] * dollars[name] for name in dollars)
    if left <= budget or excess <= 0:
        return shares
    if budget < LEAST * left:
        raise ValueError(
            f"buys no sensible recipe: the shortest costs ${math.ceil(LEAST * left):,} of "
            f"${sum(dollars.values()):,.0f} ({RULE})"
        )
    return {name: share * budget / left for name, share in shares.items()}
