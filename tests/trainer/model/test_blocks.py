"""The parts of a block."""

import pytest
import torch
import torch.nn.functional as F

from trainer.model.blocks import AdaLN, Branch, Context, Modulation, RMSNorm, SwiGLU
from trainer.model.config import XUTConfig


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_norm_takes_its_statistics_in_float32_under_autocast() -> None:
    """Values whose mean square overflows bfloat16's eight bits: rounded once, at the end."""
    norm = RMSNorm(512)
    x = (100 + torch.randn(4, 512, generator=seeded(0))).bfloat16()
    exact = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(x), exact)


def test_norm_scales_and_shifts_by_sample() -> None:
    norm = RMSNorm(8)
    torch.nn.init.normal_(norm.weight, generator=seeded(0))
    x, gain, shift = torch.randn(2, 5, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight * gain + shift
    torch.testing.assert_close(norm(x, gain, shift), wanted)


def test_modulation_is_applied_in_float32_and_rounded_once() -> None:
    norm = RMSNorm(512)
    x = torch.randn(4, 3, 512, generator=seeded(0)).bfloat16()
    gain, shift = (torch.randn(4, 1, 512, generator=seeded(i)) for i in (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(x, gain, shift)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain + shift
    assert found.dtype == torch.bfloat16
    # Half a step of bfloat16 relative to the result, and a little for float32's own rounding.
    assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() * 1.01 + 1e-6).all()


def test_a_gate_near_one_counts_in_bfloat16() -> None:
    """1.0019 is 1 in bfloat16."""
    branch = Branch("mlp", XUTConfig(dim=64, heads=1, mlp_dim=64, depth=1), torch.nn.Identity())
    h = torch.randn(2, 5, 64, generator=seeded(0)).bfloat16()
    outputs = []
    for gate in (1.0, 1.0019):
        modulation = Modulation(*(torch.full((2, 1, 64), value) for value in (1.0, 0.0, gate)))
        context = Context(torch.zeros(2, 5, 2), None, None, torch.zeros(2, 64), {"mlp": modulation})
        outputs.append(branch(h, context))
    assert outputs[0].dtype == torch.bfloat16
    assert (outputs[0] != outputs[1]).any()


@pytest.mark.parametrize(("zero_gate", "gate"), [(False, 1.0), (True, 0.0)])
def test_modulation_with_a_zero_last_layer_is_neutral(zero_gate: bool, gate: float) -> None:
    adaln = AdaLN(8, deep=True, zero_gate=zero_gate)
    torch.nn.init.zeros_(adaln.out.weight)
    torch.nn.init.zeros_(adaln.out.bias)
    modulation = adaln(torch.randn(3, 8, generator=seeded(0)))
    for value, wanted in zip(modulation, (1.0, 0.0, gate), strict=True):
        assert torch.equal(value, torch.full((3, 1, 8), wanted))


def test_modulation_is_layernorm_linear_mish_linear_in_the_order_scale_shift_gate() -> None:
    adaln = AdaLN(8, deep=True, zero_gate=False)
    condition = torch.randn(3, 8, generator=seeded(0))
    hidden = F.layer_norm(condition, (8,)) @ adaln.hidden.weight.T + adaln.hidden.bias
    out = hidden * torch.tanh(torch.log1p(hidden.exp())) @ adaln.out.weight.T + adaln.out.bias
    gain, shift, gate = (value[:, 0] for value in adaln(condition))
    torch.testing.assert_close(torch.cat([gain - 1, shift, gate - 1], 1), out)


def test_swiglu_gates_with_its_first_half() -> None:
    mlp = SwiGLU(4, 6)
    x = torch.randn(3, 4, generator=seeded(0))
    gate, value = (x @ mlp.up.weight.T + mlp.up.bias).split(6, dim=-1)
    wanted = (gate / (1 + (-gate).exp()) * value) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), wanted)
