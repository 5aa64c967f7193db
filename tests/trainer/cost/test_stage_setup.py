"""Operations of a stage and the lengths of its padded texts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.core.errors import UsageError
from trainer.cost.stage_setup import padded_tokens, stage_setup
from trainer.encoders.random_encoders import local_text_encoder, qwen3_600m, sdxl_vae
from trainer.recipe.memory import training_bytes


def test_the_operations_of_the_encoders_equal_those_of_a_flop_counter() -> None:
    """The counter runs the encoders that a measurement uses in their place."""
    setup = replace(stage_setup("256", {}, 4), text_tokens=48)

    def saved_by(**embedded: str) -> float:
        return setup.total_operations - replace(setup, stage=replace(setup.stage, **embedded)).total_operations

    meta = torch.device("meta")
    vae, text = sdxl_vae(meta, torch.float32, False).vae, qwen3_600m(meta, torch.float32).model
    with meta, torch.no_grad():
        with FlopCounterMode(display=False) as image_count:
            vae.encode(torch.zeros(1, 3, 256, 256))
        with FlopCounterMode(display=False) as text_count:
            text.eval()(input_ids=torch.zeros(1, 48, dtype=torch.long))
    assert saved_by(codec="dct") == pytest.approx(image_count.get_total_flops(), rel=1e-3)
    assert saved_by(text_encoder="local") == pytest.approx(text_count.get_total_flops(), rel=1e-3)


def test_recomputing_every_block_takes_a_third_more() -> None:
    """A forward pass in addition to a forward pass and a backward pass of twice its operations."""
    embedded = {"codec": "dct", "text_encoder": "local"}
    whole, plain = (
        stage_setup("512", {"checkpointing": kind, **embedded}, 4).total_operations for kind in ("all", "none")
    )
    assert whole / plain == pytest.approx(4 / 3, rel=1e-3)


def test_the_local_text_encoder_is_as_wide_as_planned() -> None:
    assert stage_setup("demo", {}, 1).model.text_dim == local_text_encoder(torch.device("cpu")).dim


def test_a_vision_model_is_planned_for_also_where_it_is_not_on_this_machine(
    vision_folder: Path, tmp_path: Path
) -> None:
    def added(**repa: str) -> int:
        setups = (stage_setup("256", {f"repa.{name}": text for name, text in more.items()}, 4) for more in ({}, repa))
        plain, aligned = (training_bytes(setup.model, setup.stage, 1, setup.codec_factor) for setup in setups)
        return aligned - plain

    assert added(features=str(vision_folder)) > 18 * 2048 * (1024 + 2048 + 24), "its projector"
    assert added(features="nobody/no-such-model") > 2 * 300e6, "ViT-L in bfloat16"
    with pytest.raises(UsageError, match="vision model"):
        added(features=str(tmp_path))
    with pytest.raises(UsageError, match="at most 20"):
        added(features=str(vision_folder), block="21")


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_texts_are_padded_to_the_longest_of_a_micro_batch(micro_batch: int) -> None:
    lengths = {20: 1, 60: 1}  # padded to 32 and 64
    all_short = 0.5**micro_batch
    expected = round(32 * all_short + 64 * (1 - all_short))
    assert padded_tokens(lengths, 256, 32, micro_batch, micro_batch) == expected


@pytest.mark.parametrize(("micro_batch", "share"), [(2, 8), (16, 64), (64, 64)])
def test_a_sorted_share_is_padded_as_random_texts_are(micro_batch: int, share: int) -> None:
    draw = np.random.default_rng(0)
    lengths = {10: 2, 50: 1, 90: 3, 200: 1}
    texts = draw.choice(np.repeat(list(lengths), list(lengths.values())), (4000, share))
    longest = np.sort(texts, axis=1)[:, micro_batch - 1 :: micro_batch]
    padded = np.ceil(longest / 32) * 32
    assert padded_tokens(lengths, 256, 32, micro_batch, share) == pytest.approx(padded.mean(), abs=1)


def test_texts_are_padded_to_at_most_the_longest_allowed_length() -> None:
    assert padded_tokens({0: 1, 500: 1}, 100, 32, 512, 512) == 100
    assert padded_tokens({0: 5}, 100, 32, 8, 64) == 32, "an empty text has a token"
