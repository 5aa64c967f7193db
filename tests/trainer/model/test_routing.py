"""TREAD's choice of tokens."""

import pytest
import torch

from trainer.model.routing import gather_tokens, kept_image_tokens, scatter_tokens, select_tokens


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("tokens", "rate", "kept"),
    [(256, 0.5, 128), (64, 0.5, 32), (1024, 0.75, 256), (9, 0.5, 5), (4, 0.99, 1), (4, 0.0, 4)],
)
def test_the_rate_is_the_share_of_image_tokens_that_are_routed_around(tokens: int, rate: float, kept: int) -> None:
    assert kept_image_tokens(tokens, rate) == kept
    assert select_tokens(keys(3), tokens, 7, rate).shape == (3, kept + 7)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_outside_0_to_1_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="selection_rate"):
        kept_image_tokens(64, rate)


def test_selection_is_ascending_without_repeats_and_keeps_all_text() -> None:
    index_BK = select_tokens(keys(50), 64, 5, 0.5)
    assert (index_BK.diff(dim=1) > 0).all()
    assert torch.equal(index_BK[:, -5:], torch.arange(64, 69).expand(50, 5))
    assert (index_BK[:, :-5] < 64).all()


def test_a_sample_keeps_the_same_tokens_in_any_batch() -> None:
    key_B = keys(8)
    together = select_tokens(key_B, 64, 0, 0.5)
    alone = torch.cat([select_tokens(key_B[i : i + 1], 64, 0, 0.5) for i in range(8)])
    assert torch.equal(together, alone)


def test_every_bit_of_the_key_changes_the_selection() -> None:
    key = keys(1, seed=3)
    flipped = key ^ (torch.ones(64, dtype=torch.int64) << torch.arange(64))
    selections = select_tokens(torch.cat([key, flipped]), 64, 0, 0.5)
    assert len({tuple(row.tolist()) for row in selections}) == 65


def test_tokens_are_drawn_evenly_and_independently() -> None:
    """Over 20,000 consecutive keys every token is kept half of the time, every two together as an even draw has it."""
    samples, tokens, kept = 20_000, 16, 8
    index_BK = select_tokens(torch.arange(samples), tokens, 0, 0.5)
    chosen_BN = torch.zeros(samples, tokens).scatter(1, index_BK, 1.0)
    share_NN = chosen_BN.T @ chosen_BN / samples
    pair = kept * (kept - 1) / (tokens * (tokens - 1))
    wanted = torch.full((tokens, tokens), pair).fill_diagonal_(kept / tokens)
    # Six standard errors of a share of 20,000.
    torch.testing.assert_close(share_NN, wanted, atol=6 * 0.5 / samples**0.5, rtol=0)


def test_scatter_undoes_gather_and_leaves_the_others_bit_equal() -> None:
    x_BSD = torch.randn(4, 20, 6, generator=torch.Generator().manual_seed(0))
    index_BK = select_tokens(keys(4), 16, 4, 0.5)
    assert torch.equal(scatter_tokens(x_BSD, index_BK, gather_tokens(x_BSD, index_BK)), x_BSD)
    changed_BSD = scatter_tokens(x_BSD, index_BK, gather_tokens(x_BSD, index_BK) + 1)
    kept_BS = torch.zeros(4, 20, dtype=torch.bool).scatter(1, index_BK, True)
    assert torch.equal(changed_BSD[~kept_BS], x_BSD[~kept_BS])
    assert torch.equal(changed_BSD[kept_BS], x_BSD[kept_BS] + 1)
