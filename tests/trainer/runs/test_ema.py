import contextlib

import pytest
import torch
from torch import nn

from trainer.runs.ema import EMA


def set_weights(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)


def test_the_average_follows_its_closed_form_through_the_warm_up() -> None:
    module = nn.Linear(3, 2)
    set_weights(module, 5.0)
    ema = EMA(module, decay=0.5)
    expected = 5.0
    # (1 + n) / (10 + n) reaches 0.5 at n = 8: both sides of the minimum are seen.
    for n in range(20):
        set_weights(module, float(n))
        ema.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert ema.updates == 20
    for name in ("weight", "bias"):
        torch.testing.assert_close(ema.weights[name], torch.full_like(ema.weights[name], expected))


def test_a_skipped_update_changes_neither_averages_nor_count() -> None:
    module = nn.Linear(3, 2)
    ema, unskipped = EMA(module, 0.9), EMA(module, 0.9)
    for value, skip in [(1.0, False), (2.0, True), (3.0, False)]:
        set_weights(module, value)
        ema.update(module, torch.tensor(skip))
        if not skip:
            unskipped.update(module)
    assert ema.updates == 2
    assert all(torch.equal(ema.weights[name], unskipped.weights[name]) for name in ema.weights)


def test_averages_of_bf16_weights_keep_what_bf16_would_round_away() -> None:
    module = nn.Linear(4, 4).bfloat16()
    set_weights(module, 1.0)
    ema = EMA(module, decay=0.999)
    ema.updates.fill_(10**6)
    set_weights(module, 1.0078125)
    ema.update(module)
    average = ema.weights["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((4, 4), 1 + 0.0078125 / 1000), atol=1e-7, rtol=0)


def test_the_averages_are_in_place_only_inside_the_context() -> None:
    module = nn.Linear(3, 2)
    ema = EMA(module, decay=0.9)
    averages = {name: w.clone() for name, w in ema.weights.items()}
    set_weights(module, 7.0)
    with contextlib.suppress(KeyError), ema.applied(module) as swapped:
        for name, p in swapped.named_parameters():
            assert torch.equal(p, averages[name])
        raise KeyError
    assert all(bool((p == 7).all()) for p in module.parameters())


def test_a_loaded_average_continues_like_the_original() -> None:
    module = nn.Linear(3, 2)
    whole, first = EMA(module, 0.9), EMA(module, 0.9)
    for value in (1.0, 2.0):
        set_weights(module, value)
        whole.update(module)
        first.update(module)
    second = EMA(nn.Linear(3, 2), 0.9)
    second.load_state_dict(first.state_dict())
    set_weights(module, 3.0)
    whole.update(module)
    second.update(module)
    assert second.updates == whole.updates
    assert all(torch.equal(second.weights[name], whole.weights[name]) for name in whole.weights)


def test_averages_of_another_model_are_refused_by_name_and_shape() -> None:
    ema = EMA(nn.Linear(3, 2), 0.9)
    with pytest.raises(ValueError, match=r"another model.*\(2, 3\).*\(2, 4\)"):
        ema.load_state_dict(EMA(nn.Linear(4, 2), 0.9).state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_0_to_1_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=str(decay)):
        EMA(nn.Linear(1, 1), decay)
