"""Rotary embedding: which dims rotate, by which angle, and the effect on attention scores."""

import math

import torch

from trainer.model.rope import axial_frequencies, rotary_table, rotate


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_axial_frequencies_run_from_pi_to_five_pi_on_the_first_half_of_a_head() -> None:
    frequency_1F2 = axial_frequencies(128)
    assert frequency_1F2.shape == (1, 32, 2)
    y, x = frequency_1F2[0].unbind(-1)
    assert torch.equal(y, x)
    torch.testing.assert_close(y[[0, 15]], torch.tensor([math.pi, 5 * math.pi]))
    ratios = y[1:16] / y[:15]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 5 ** (1 / 15)))
    assert not y[16:].any()


def test_rotation_turns_neighbouring_dims_by_position_times_frequency() -> None:
    frequency_AF2 = torch.randn(3, 2, 2, generator=seeded(0)).exp()
    position_BS2 = torch.randn(1, 5, 2, generator=seeded(1))
    x_BSAE = torch.randn(1, 5, 3, 8, generator=seeded(2))
    turned = rotate(x_BSAE, rotary_table(position_BS2, frequency_AF2))
    for token in range(5):
        for head in range(3):
            for pair in range(4):
                angle = position_BS2[0, token, pair % 2] * frequency_AF2[head, pair // 2, pair % 2]
                a, b = x_BSAE[0, token, head, 2 * pair : 2 * pair + 2]
                wanted = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
                torch.testing.assert_close(turned[0, token, head, 2 * pair : 2 * pair + 2], wanted)


def test_second_half_of_a_head_and_a_token_at_the_origin_pass_bit_equal() -> None:
    position_BS2 = torch.randn(2, 6, 2, generator=seeded(0))
    position_BS2[:, 3:] = 0
    x_BSAE = torch.randn(2, 6, 2, 32, generator=seeded(1))
    turned = rotate(x_BSAE, rotary_table(position_BS2, axial_frequencies(32)))
    assert torch.equal(turned[..., 16:], x_BSAE[..., 16:])
    assert torch.equal(turned[:, 3:], x_BSAE[:, 3:])
    assert not torch.equal(turned[:, :3, :, :16], x_BSAE[:, :3, :, :16])


def test_scores_depend_on_the_distance_of_tokens_only() -> None:
    position_BS2 = torch.rand(1, 9, 2, generator=seeded(0)) - 0.5
    q, k = torch.randn(2, 1, 9, 2, 64, generator=seeded(1)).unbind(0)

    def scores(shift: tuple[float, float]) -> torch.Tensor:
        table = rotary_table(position_BS2 + torch.tensor(shift), axial_frequencies(64))
        return torch.einsum("bsae,btae->bast", rotate(q, table), rotate(k, table))

    torch.testing.assert_close(scores((0.7, -0.3)), scores((0.0, 0.0)), atol=1e-4, rtol=1e-5)


def test_table_and_rotation_stay_float32_for_bfloat16_queries() -> None:
    table = rotary_table(torch.full((1, 1, 2), 0.4), axial_frequencies(32))
    assert table.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rotary_table(torch.full((1, 1, 2), 0.4), axial_frequencies(32)).dtype == torch.float32
    x = torch.randn(1, 1, 1, 32, generator=seeded(0)).bfloat16()
    # Rounded once, at the end: as near to the float32 rotation as bfloat16 can be.
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())
