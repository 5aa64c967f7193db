"""XUTConfig: the published sizes, and what it refuses."""

import json
from typing import Any

import pytest
import torch

from trainer.model.blocks import Branch
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT


@pytest.mark.parametrize(
    ("config", "millions", "tolerance"),
    [
        (XUTConfig.base(), 343.2, 0.005),
        (XUTConfig.large(), 555.6, 0.005),
        (XUTConfig.small(), 227.0, 0.005),
        (XUTConfig.released(), 343.2, 0.005),
        (XUTConfig.tiny(in_channels=16, patch_size=1, text_dim=128), 2.0, 0.05),
    ],
    ids=["base", "large", "small", "released", "tiny"],
)
def test_parameter_counts_are_the_papers(config: XUTConfig, millions: float, tolerance: float) -> None:
    with torch.device("meta"):
        model = XUT(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=tolerance)


def test_base_has_20_blocks_and_24_attention_layers() -> None:
    with torch.device("meta"):
        model = XUT(XUTConfig.base())
    kinds = [module.kind for module in model.modules() if isinstance(module, Branch)]
    assert (kinds.count("attn"), kinds.count("mlp"), kinds.count("cross")) == (20, 20, 4)


def test_config_survives_json() -> None:
    config = XUTConfig.released(depth=3, qk_norm=True)
    assert XUTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_and_missing_fields_are_named() -> None:
    fields = XUTConfig.tiny().to_dict()
    del fields["dim"]
    with pytest.raises(ValueError, match=r"unknown fields \[dims, wings\], missing fields \[dim\]"):
        XUTConfig.from_dict({**fields, "wings": 2, "dims": 3})


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"absolute_position": "learned"}, "absolute_position must be one of none, waves"),
        ({"skip": "sum"}, "skip must be one of cross, concat, add, none: got 'sum'"),
        ({"depth": 0}, "depth"),
        ({"depth": 2.0}, "depth"),
        ({"qk_norm": "no"}, "qk_norm"),
        ({"heads": 3}, "multiple of 24"),
    ],
)
def test_impossible_configs_are_refused(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        XUTConfig.tiny(**overrides)
