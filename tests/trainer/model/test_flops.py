"""The closed form of XUT's operations against torch's count."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.model.config import XUTConfig
from trainer.model.flops import count_flops
from trainer.model.xut import XUT


def counted(config: XUTConfig, side: int, text_tokens: int, rate: float) -> tuple[int, int]:
    """Operations of a forward pass and of a whole step on one sample. (The meta device takes ten times as long.)"""
    model = XUT(config)
    inputs: dict[str, Any] = {
        "text": torch.zeros(1, text_tokens, config.text_dim),
        "position_map": torch.zeros(1, (side // config.patch_size) ** 2, 2),
        "aspect": torch.zeros(1),
        "routing_key": torch.zeros(1, dtype=torch.int64),
    }
    x, t = torch.zeros(1, config.in_channels, side, side), torch.zeros(1)
    # The fused kernels are counted by rules of their own, which include what they recompute.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        velocity = model(x, t, **inputs, selection_rate=rate)
        forward = counter.get_total_flops()
        velocity.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"skip": "concat"},
        {"skip": "none"},
        {"adaln": "per_layer"},
        {"patch_size": 1, "in_channels": 16},
        {"absolute_position": "waves"},
    ],
    ids=["paper", "concat", "none", "per_layer", "dct", "waves"],
)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_closed_form_is_what_torch_counts(overrides: dict[str, Any], rate: float) -> None:
    config = XUTConfig(dim=64, heads=2, mlp_dim=160, depth=2, text_dim=48, **overrides)
    forward, step = counted(config, side=16, text_tokens=12, rate=rate)
    closed = count_flops(config, (16 // config.patch_size) ** 2, 12, rate)
    assert (closed.forward, closed.step) == (forward, step)


def test_base_at_512_pixels_with_tread_takes_three_fifths_of_the_dense_operations() -> None:
    """1024 image tokens and 96 of text: 16 of 20 blocks see half of the image tokens."""
    dense, routed = (count_flops(XUTConfig.base(), 1024, 96, rate).step for rate in (0.0, 0.5))
    assert routed / dense == pytest.approx(0.595, abs=0.005)
