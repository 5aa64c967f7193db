"""Attention of padded batches with and without a mask. `varlen_attn` needs a GPU: here a plain one replaces it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model import attention
from trainer.model.attention import Padding, boundaries, measure, padding_of
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int) -> Tensor:
    """The contract of torch.nn.attention.varlen.varlen_attn, one sequence at a time."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert torch.equal(cu_q, cu_k)
    assert cu_q[0] == 0
    assert cu_q[-1] == len(q)
    assert int(cu_q.diff().min()) >= 0
    assert int(cu_q.diff().max()) <= most_q == most_k
    parts = []
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        sequence = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*sequence)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)


def test_boundaries_separate_real_tokens_from_padding() -> None:
    assert boundaries(torch.tensor([5, 3, 1]), 5).tolist() == [0, 5, 5, 8, 10, 11, 15]


def test_boundaries_of_kept_tokens_count_the_kept_ones() -> None:
    whole = Padding(None, boundaries(torch.tensor([7, 5]), 8))
    kept = whole.of_kept(torch.zeros(2, 6, dtype=torch.int64), 8)
    assert kept.key_mask is None
    assert torch.equal(kept.boundaries, boundaries(torch.tensor([5, 3]), 6))


@pytest.mark.parametrize("skip", ["cross", "concat"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_varlen_equals_the_masked_reference_in_velocity_and_gradients(plain: None, rate: float, skip: str) -> None:
    shape: dict[str, Any] = {"dim": 32, "heads": 2, "mlp_dim": 64, "depth": 2, "dec_blocks": 1, "post_blocks": 1}
    config = XUTConfig(**shape, text_dim=8, skip=skip)
    torch.manual_seed(0)
    model = XUT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch: dict[str, Any] = {
        "x_BCHW": torch.randn(3, 4, 8, 8),
        "t_B": torch.rand(3),
        "text": torch.randn(3, 6, 8),
        "text_mask": torch.arange(6) < torch.tensor([[6], [1], [3]]),
        "position_map": torch.rand(3, 16, 2),
        "aspect": torch.zeros(3),
        "selection_rate": rate,
        "routing_key": torch.tensor([5, 6, 7]),
    }
    results = []
    for kernel in ("default", "varlen"):
        model.attention_kernel = kernel  # type: ignore[assignment]
        model.zero_grad()
        velocity = model(**batch)
        velocity.square().sum().backward()
        results.append([velocity.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
    for masked, varlen in zip(*results, strict=True):
        torch.testing.assert_close(varlen, masked, atol=1e-5 * float(masked.abs().max()), rtol=1e-5)


def test_without_padding_no_mask_and_no_boundaries_are_made(plain: None) -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 4).unbind(0)
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    assert torch.equal(attention.attention(q, k, v, None, "varlen"), expected)
    everything = padding_of(torch.ones(2, 5, dtype=torch.bool), "varlen")
    torch.testing.assert_close(attention.attention(q, k, v, everything, "varlen"), expected)


SHAPE = {"heads": 2, "head_dim": 16, "image_tokens": 16, "text_tokens": 8, "dtype": torch.float32}


def test_only_kernels_that_run_here_qualify() -> None:
    assert measure(torch.device("cpu"), **SHAPE).keys() == {"default"}  # the others need a GPU


def test_a_kernel_that_attends_to_padding_does_not_qualify(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        rows = [x.unflatten(0, (8, -1)).transpose(1, 2) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2).flatten(0, 1)

    monkeypatch.setattr(attention, "varlen_attn", unmasked)
    assert measure(torch.device("cpu"), **SHAPE).keys() == {"default"}
