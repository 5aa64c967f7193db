"""Shortens the stages of a plan until it costs no more than a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.core.errors import UsageError
from trainer.cost.stage_setup import StageSetup

# The first stage learns what things look like; later ones learn detail and cost more per sample. Both shares are our
# judgement, not measured: of a later stage, before the first one is shortened; then of what is left of every stage.
LATER_FLOOR, LEAST = 0.25, 0.5
RULE = (
    f"later stages are shortened first, the last before the others, each to at least {LATER_FLOOR:.0%} of its samples, "
    f"then all stages in proportion, to at least {LEAST:.0%} of that"
)


def shortened(setups: Sequence[StageSetup], dollars: Mapping[str, float], budget: float) -> list[StageSetup]:
    """The stages with fewer samples, in whole batches. Raises UsageError like `affordable`."""
    shares, shorter = affordable(dollars, budget), []
    for setup in setups:
        stage, share = setup.stage, shares[setup.name]
        batches = max(1, math.floor(stage.samples * share / stage.batch_size))
        samples = stage.samples if share >= 1 else batches * stage.batch_size
        shorter.append(replace(setup, stage=replace(stage, samples=samples)))
    return shorter


def affordable(dollars: Mapping[str, float], budget: float) -> dict[str, float]:
    """Share in (0, 1] of each stage's samples, so that all cost at most `budget`. dollars: of whole stages, in training
    order. Raises UsageError, which names the smallest budget, if this one is too small."""
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
        raise UsageError(
            f"--budget {budget:g} buys no sensible recipe: the shortest costs ${math.ceil(LEAST * left):,} of "
            f"${sum(dollars.values()):,.0f} ({RULE}). Give that, or fewer --stages, a smaller model, a cheaper GPU"
        )
    return {name: share * budget / left for name, share in shares.items()}
