"""The memory estimate against what torch keeps for the backward pass."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.diffusion.repa import RepaConfig, RepaProjector, alignment_loss
from trainer.encoders.vision import load_vision_model
from trainer.model.attention import Padding
from trainer.model.blocks import Block, BranchKind, Context, Modulation
from trainer.model.config import XUTConfig
from trainer.model.rope import axial_frequencies, rotary_table
from trainer.model.xut import XUT, BlockOutput, Checkpointing, Precision
from trainer.recipe import memory
from trainer.recipe.stage_config import PRESETS
from trainer.recipe.stages import STAGES

BATCH, TOKENS, DIM, MLP = 2, 96, 256, 512


def kept_bytes(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes of the storages that a forward pass keeps for its backward pass, without weights and their casts."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    shapes = {tuple(parameter.shape) for parameter in parameters} | {tuple(p.T.shape) for p in parameters}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def bytes_per_token(compiled: bool, precision: Precision, reads_skip: bool) -> float:
    """What one block keeps, from the difference between two blocks and one."""
    config = XUTConfig(dim=DIM, heads=2, mlp_dim=MLP, depth=1)
    torch.manual_seed(0)
    position_BS2 = torch.rand(BATCH, TOKENS, 2)
    rotary = rotary_table(position_BS2, axial_frequencies(DIM // 2))
    one = torch.ones(BATCH, 1, DIM, requires_grad=True)  # a learnt gate keeps the result of its branch
    modulation = Modulation(one, one, one)
    mask = torch.ones(BATCH, 1, 1, TOKENS, dtype=torch.bool)
    shared: dict[BranchKind, Modulation] = {"attn": modulation, "cross": modulation, "mlp": modulation}
    context = Context(position_BS2, rotary, Padding(mask, None), torch.randn(BATCH, DIM), shared)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    h, skip = (torch.randn(BATCH, TOKENS, DIM, dtype=dtype, requires_grad=True) for _ in range(2))

    def kept(count: int) -> int:
        blocks = nn.ModuleList(Block(config, reads_skip=reads_skip) for _ in range(count))

        def forward() -> Tensor:
            out, source = h * 1, skip * 1
            for block in blocks:
                out = block(out, context, source if reads_skip else None)
            return out

        torch._dynamo.reset()
        run = torch.compile(forward, backend="aot_eager_decomp_partition", fullgraph=True) if compiled else forward
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return kept_bytes(run, list(blocks.parameters()))

    return (kept(2) - kept(1)) / (BATCH * TOKENS)


@pytest.mark.parametrize(("compiled", "precision"), [(True, "bf16"), (False, "bf16"), (False, "fp32")])
@pytest.mark.parametrize("reads_skip", [False, True])
def test_a_block_keeps_what_the_estimate_counts(compiled: bool, precision: Precision, reads_skip: bool) -> None:
    """Compiled with the partitioner of torch.compile, which decides what is kept and what is computed again."""
    counted = memory.KEPT[compiled, precision]
    values = counted.dim * DIM + counted.mlp * MLP + (counted.cross * DIM if reads_skip else 0)
    assert bytes_per_token(compiled, precision, reads_skip) == pytest.approx(counted.bytes * values, rel=0.03)


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "all"])
def test_a_whole_model_keeps_what_the_estimate_counts(checkpointing: Checkpointing) -> None:
    """An uncompiled one with routing, in which the keys of recomputed blocks and small tensors count too."""
    config = XUTConfig(dim=DIM, heads=2, mlp_dim=MLP, depth=2, text_dim=64, patch_size=1)
    stage = replace(STAGES["demo"], resolution=64, text_tokens=32, selection_rate=0.5, codec="pixel")
    model = XUT(config, checkpointing)
    inputs: dict[str, Any] = {
        "text": torch.randn(BATCH, 32, 64),
        "position_map": torch.rand(BATCH, 64, 2),
        "text_mask": torch.ones(BATCH, 32, dtype=torch.bool),
        "selection_rate": 0.5,
        "routing_key": torch.arange(BATCH),
    }
    latents = torch.randn(BATCH, 4, 8, 8)
    found = kept_bytes(lambda: model(latents, torch.rand(BATCH), **inputs), list(model.parameters())) / BATCH
    estimated = memory.activation_bytes(config, stage, 8, checkpointing)
    if checkpointing != "none":  # the block that is complete during the backward pass is not kept before it
        complete = memory.KEPT[False, "fp32"]
        one = complete.bytes * max(
            96 * (complete.dim * DIM + complete.mlp * MLP),
            64 * ((complete.dim + complete.cross) * DIM + complete.mlp * MLP),
        )
        estimated -= one
    assert found == pytest.approx(estimated, rel=0.25)


def test_the_default_first_stage_does_not_fit_32_gb_with_the_reports_micro_batch() -> None:
    """An independent count with AOTAutograd's partitioner: 45.9 kB per token and block, 58 GB with 128, 34 with 64."""
    stage, base = STAGES["256"], XUTConfig.base()
    blocks = 20
    per_block = memory.activation_bytes(base, replace(stage, selection_rate=0.0), 8) / blocks / 512
    assert per_block == pytest.approx(45_900, rel=0.05)
    sizes = {size: memory.training_bytes(base, stage, size, 8) / 1e9 for size in (32, 64, 128)}
    assert sizes[128] == pytest.approx(58, rel=0.1)
    assert sizes[64] == pytest.approx(34, rel=0.15)


def test_a_micro_batch_adds_its_activations_or_the_vaes_encoding() -> None:
    base, stage = XUTConfig.base(), STAGES["512"]
    assert memory.parameters(base) == pytest.approx(343e6, rel=0.01)
    one, two = (memory.training_bytes(base, stage, micro, 8) for micro in (1, 2))
    assert two - one == memory.activation_bytes(base, stage, 8)
    # Weight, gradient, two moments and three averages in fp32, and a cast to bfloat16.
    assert one - (two - one) == 30 * memory.parameters(base) + 3_000_000_000
    last = STAGES["1024"]
    one, two = (memory.training_bytes(base, last, micro, 8, checkpointing="all") for micro in (1, 2))
    assert two - one == 1024 * 1024**2 > memory.activation_bytes(base, last, 8, "all"), "of the VAE"


def test_the_estimate_is_near_one_measured_step() -> None:
    """tests/bench/RESULTS.md: a dense fp32 step of base at 512 pixels, one sample, 96 text tokens: 8.3 GiB."""
    stage = replace(STAGES["512"], precision="fp32", compiled=False, selection_rate=0.0, text_tokens=96)
    base = XUTConfig.base()
    without_average = 16 * memory.parameters(base) + memory.activation_bytes(base, stage, 8)
    assert without_average / 2**30 == pytest.approx(8.3, rel=0.15)


@pytest.mark.parametrize("gigabytes", [24, 32, 80])
@pytest.mark.parametrize("model", ["small", "base", "large"])
@pytest.mark.parametrize("name", ["256", "512", "768", "1024"])
@pytest.mark.parametrize("workers", [1, 4])
def test_every_stage_and_preset_fits_common_cards_without_a_setting(
    gigabytes: int, model: str, name: str, workers: int
) -> None:
    """Cards offer a little less than their nominal GiB: a 4090 23.5, a 5090 31.4, an A100 79.2."""
    stage, available = STAGES[name], 0.975 * gigabytes * 2**30
    config = PRESETS[model]()
    fit = memory.fitting(config, stage, workers, 8, available)
    assert fit is not None
    assert stage.batch_size % (workers * fit.micro_batch) == 0
    needed = memory.training_bytes(config, stage, fit.micro_batch, 8, checkpointing=fit.checkpointing)
    assert needed <= (1 - memory.MARGIN) * available
    if gigabytes == 80:
        assert fit.checkpointing == "none", "nothing is recomputed where there is room"


def test_the_reports_cards_need_no_recomputation_for_the_base_model() -> None:
    """An independent estimate for 32 GB: 16 samples at 512, 8 at 768 and 2 at 1024, nothing recomputed."""
    base, available = XUTConfig.base(), 31.4 * 2**30
    fits = {name: memory.fitting(base, STAGES[name], 4, 8, available) for name in ("256", "512", "768", "1024")}
    assert fits == {"256": (32, "none"), "512": (16, "none"), "768": (8, "none"), "1024": (4, "none")}


def test_what_a_stage_sets_is_kept_and_what_cannot_fit_is_none() -> None:
    base = XUTConfig.base()
    given = replace(STAGES["512"], micro_batch=3, checkpointing="all")
    assert memory.fitting(base, given, 4, 8, 80e9) == (2, "all")
    assert memory.fitting(base, STAGES["1024"], 4, 8, 12e9) is None


def test_an_alignment_adds_the_vision_model_the_projector_and_what_it_keeps(vision_folder: Path) -> None:
    config = XUTConfig.tiny(text_dim=16, patch_size=1)
    plain = replace(STAGES["demo"], selection_rate=0.0)
    stage = replace(plain, repa=RepaConfig(features=str(vision_folder), width=96))
    vision = load_vision_model(str(vision_folder))
    projector = RepaProjector(config.dim, 96, 24, seed=0)
    numbers = [sum(p.numel() for p in each.parameters()) for each in (vision.model, projector)]
    fixed = 2 * numbers[0] + 18 * numbers[1]
    one, two = (
        memory.training_bytes(config, stage, size, 8) - memory.training_bytes(config, plain, size, 8) for size in (1, 2)
    )
    assert one - (two - one) == fixed

    tokens_BND = torch.randn(4, 64, config.dim, requires_grad=True)
    features_BNF = torch.randn(4, 64, 24)
    weights = {parameter.untyped_storage().data_ptr() for parameter in projector.parameters()}
    kept: dict[int, int] = {features_BNF.untyped_storage().data_ptr(): features_BNF.untyped_storage().nbytes()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses_B = alignment_loss(projector, BlockOutput(1, tokens_BND), features_BNF)
    assert losses_B.requires_grad, "what the graph keeps is alive"
    assert sum(kept.values()) / 4 == pytest.approx(two - one, rel=0.25)
