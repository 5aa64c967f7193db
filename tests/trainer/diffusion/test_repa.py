"""Alignment of tokens with features. Axes: B batch, K kept tokens, N image tokens, D width, F features."""

import pytest
import torch
from torch import Tensor, nn

from trainer.diffusion.repa import RepaConfig, RepaProjector, alignment_loss, projector_parameters
from trainer.model.config import XUTConfig
from trainer.model.routing import gather_tokens
from trainer.model.xut import XUT, BlockOutput
from trainer.optimization.optimizers import OptimizerConfig, build_optimizer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss(tokens: Tensor, features: Tensor, index: Tensor | None = None, projector: nn.Module | None = None) -> Tensor:
    return alignment_loss(projector or nn.Identity(), BlockOutput(1, tokens, index), features)


def test_aligned_tokens_have_loss_0_orthogonal_ones_1_and_opposite_ones_2_whatever_their_scale() -> None:
    tokens_BND = normal(3, 5, 8)
    orthogonal = torch.cat([tokens_BND[..., 4:], -tokens_BND[..., :4]], dim=-1)
    zero = torch.zeros(3)
    torch.testing.assert_close(loss(tokens_BND, 7 * tokens_BND), zero, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss(tokens_BND, orthogonal), zero + 1, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss(tokens_BND, -0.1 * tokens_BND), zero + 2, atol=1e-6, rtol=0)


def test_projections_of_the_features_themselves_have_loss_0() -> None:
    projector, tokens_BND = RepaProjector(6, 12, 10, seed=0), normal(2, 4, 6)
    target = projector(tokens_BND).detach()
    torch.testing.assert_close(loss(tokens_BND, target, projector=projector), torch.zeros(2), atol=1e-6, rtol=0)
    assert (loss(tokens_BND, normal(2, 4, 10), projector=projector) > 0.3).all()


def test_kept_tokens_are_compared_with_the_features_at_their_places() -> None:
    features_BNF, index_BK = normal(2, 6, 8), torch.tensor([[5, 0, 2], [1, 3, 4]])
    kept = gather_tokens(features_BNF, index_BK)
    torch.testing.assert_close(loss(2 * kept, features_BNF, index_BK), torch.zeros(2), atol=1e-6, rtol=0)
    assert (loss(kept.flip(1), features_BNF, index_BK) > 0.1).all()


def test_the_gradient_is_that_of_the_cosine() -> None:
    """Of one token h and feature f of length 1: -(f - cos * h / |h|) / |h|, divided by the number of tokens."""
    tokens_BND, features_BNF = normal(2, 4, 8).requires_grad_(), normal(2, 4, 8, seed=1)
    loss(tokens_BND, features_BNF).sum().backward()
    with torch.no_grad():
        length = tokens_BND.norm(dim=-1, keepdim=True)
        direction, target = tokens_BND / length, features_BNF / features_BNF.norm(dim=-1, keepdim=True)
        cosine = (direction * target).sum(-1, keepdim=True)
        wanted = -(target - cosine * direction) / length / 4
    torch.testing.assert_close(tokens_BND.grad, wanted, rtol=1e-4, atol=1e-6)


def test_a_projector_depends_on_the_seed_alone_and_draws_no_other_random_numbers() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (RepaProjector(4, 8, 6, seed) for seed in (0, 0, 1))
    assert not torch.equal(first.second.weight, other.second.weight)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_are_counted() -> None:
    wanted = sum(parameter.numel() for parameter in RepaProjector(4, 8, 6, 0).parameters())
    assert projector_parameters(4, 8, 6) == wanted


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_matrix_of_the_projector_learns_at_a_rate_divided_by_its_fan_in(kind: str) -> None:
    projector = RepaProjector(512, 256, 64, seed=0)
    config = OptimizerConfig(kind=kind, learning_rate=1e-3, base_width=128)  # type: ignore[arg-type]
    rates = {
        id(parameter): (group["role"], group["lr"])
        for group in build_optimizer(projector, config).param_groups
        for parameter in group["params"]
    }
    for layer in (projector.first, projector.second, projector.third):
        assert rates[id(layer.weight)] == ("output", pytest.approx(1e-3 * 128 / layer.in_features))
        assert rates[id(layer.bias)] == ("vector", 1e-3)


def test_the_aligned_block_is_the_last_of_the_encoder_or_the_given_one() -> None:
    base, tiny = XUTConfig.base(), XUTConfig.tiny(text_dim=16)
    assert RepaConfig().block_of(base) == 5
    numbers = {name: block.number for name, block in XUT(tiny).named_modules() if hasattr(block, "number")}
    assert numbers == {"prev.0": 1, "encoder.0.0": 2, "encoder.1.0": 3, "decoder.0.0": 4, "decoder.1.0": 5, "post.0": 6}
    assert RepaConfig().block_of(tiny) == numbers["encoder.1.0"]
    assert RepaConfig(block=20).block_of(base) == 20
    with pytest.raises(ValueError, match=r"repa\.block must be at most 20"):
        RepaConfig(block=21).block_of(base)


def test_an_alignment_lasts_for_its_samples() -> None:
    assert not RepaConfig().active(0)
    assert RepaConfig(features="any").active(10**9)
    assert [RepaConfig(features="any", samples=5).active(seen) for seen in (0, 4, 5, 6)] == [True, True, False, False]


@pytest.mark.parametrize("field", ["weight", "samples", "block", "width"])
def test_numbers_out_of_range_are_refused_by_field(field: str) -> None:
    with pytest.raises(ValueError, match=f"repa\\.{field} must be"):
        RepaConfig(**{field: -1})
