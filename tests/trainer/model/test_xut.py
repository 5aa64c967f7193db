"""XUT: its wiring, its initial state, and which inputs its output depends on."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from trainer.diffusion.positions import full_position_map
from trainer.model.blocks import Branch, Modulation
from trainer.model.config import XUTConfig
from trainer.model.routing import select_tokens
from trainer.model.xut import MOST_TEXT_LENGTHS, XUT, BlockOutput, Standardization, TimeEmbedding, compiled

TEXT_DIM = 16


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Kernels this small are slower on more threads, especially beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(seed: int = 0, **overrides: Any) -> XUT:
    """A small model whose weights are all random, so that no zero initialisation hides an effect."""
    shape = {"dim": 32, "heads": 2, "mlp_dim": 48, "depth": 2, "dec_blocks": 2, "post_blocks": 1, "text_dim": TEXT_DIM}
    torch.manual_seed(seed)
    model = XUT(XUTConfig(**{**shape, **overrides}))
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() == 1 else 0.5 * parameter[0].numel() ** -0.5
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(batch: int = 2, text_tokens: int = 6, side: int = 8, seed: int = 1) -> dict[str, Any]:
    generator = seeded(seed)
    return {
        "x_BCHW": torch.randn(batch, 4, side, side, generator=generator),
        "t_B": torch.rand(batch, generator=generator),
        "text": torch.randn(batch, text_tokens, TEXT_DIM, generator=generator),
        "position_map": full_position_map(side * 8, side * 8, side // 2, side // 2).expand(batch, -1, -1),
        "aspect": torch.randn(batch, generator=generator),
    }


def fresh_model(**overrides: Any) -> XUT:
    """A small model in its initial state."""
    model = small_model(**overrides)
    torch.manual_seed(0)
    return XUT(model.config)


def capture(module: nn.Module) -> list[Any]:
    """A list that the module's next forward pass extends by its inputs and its output."""
    seen: list[Any] = []
    module.register_forward_hook(lambda module, args, out: seen.extend([args, out]))
    return seen


OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "concat": {"skip": "concat"},
    "add": {"skip": "add"},
    "none": {"skip": "none"},
    "raw_skip": {"skip_norm": False},
    "last_skip": {"skip_order": "last"},
    "qk_norm": {"qk_norm": True},
    "final_norm": {"final_norm": True},
    "per_layer": {"adaln": "per_layer"},
    "zero_gate": {"zero_gate": True},
    "average": {"text_layers": "average"},
    "standardized": {"text_features": "standardized"},
    "learned_rotary": {"rotary": "learned"},
    "replace_stream": {"replace_stream": True},
    "waves": {"absolute_position": "waves"},
}
every_option = pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS.keys())


# Wiring


def test_u_wiring_is_the_papers_example_by_gradient_probes() -> None:
    """in > a > b > c > (c,c) > d > (d,b) > e > (e,a) > out: each decoder stage, its stream cut off, reads one stage."""
    assert _stages_read(small_model(depth=3, dec_blocks=2)) == [{"c"}, {"b"}, {"a"}]


def test_released_order_reads_the_last_encoder_stage_everywhere() -> None:
    assert _stages_read(small_model(depth=3, dec_blocks=2, skip_order="last")) == [{"c"}, {"c"}, {"c"}]


@pytest.mark.parametrize("skip", ["concat", "add"])
def test_other_merges_read_the_mirrored_stage_too(skip: str) -> None:
    assert _stages_read(small_model(depth=3, dec_blocks=2, skip=skip)) == [{"c"}, {"b"}, {"a"}]


def test_without_skips_the_decoder_reads_nothing() -> None:
    assert _stages_read(small_model(depth=3, dec_blocks=2, skip="none")) == [set(), set(), set()]


def _stages_read(model: XUT) -> list[set[str]]:
    """The encoder stages (a, b, c ...) that each decoder stage reads, apart from its input stream."""
    encoded: dict[str, Tensor] = {}
    decoded: list[Tensor] = []

    def remember(name: str) -> Any:
        # A leaf of its own, so that a gradient on it cannot come through a later stage.
        return lambda module, args, out: encoded.setdefault(name, out.detach().requires_grad_())

    for name, stage in zip("abcdef", model.encoder, strict=False):
        list(stage.children())[-1].register_forward_hook(remember(name))
    for stage in model.decoder:
        first, *_, last = stage.children()
        first.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
        last.register_forward_hook(lambda module, args, out: decoded.append(out))
    model(**inputs())
    read = []
    for out in decoded:
        gradients = torch.autograd.grad(out.sum(), list(encoded.values()), allow_unused=True, retain_graph=True)
        read.append({name for name, g in zip(encoded, gradients, strict=True) if g is not None and g.abs().sum() > 0})
    return read


# Initial state


@every_option
def test_fresh_model_predicts_zero(overrides: dict[str, Any]) -> None:
    model = fresh_model(**overrides)
    assert not model(**inputs()).any()


@pytest.mark.parametrize("overrides", [{}, {"adaln": "per_layer"}, {"zero_gate": True}, {"replace_stream": True}])
def test_at_its_zero_start_the_condition_has_no_effect(overrides: dict[str, Any]) -> None:
    model = fresh_model(**overrides)
    nn.init.normal_(model.patch_out.weight)
    batch = inputs()
    velocity = model(**batch)
    assert velocity.any()
    assert torch.equal(model(**{**batch, "t_B": 1 - batch["t_B"], "aspect": batch["aspect"] + 3}), velocity)


def test_a_fresh_block_is_a_plain_pre_norm_block() -> None:
    """Written out: h + attention(norm h), h + cross-attention(norm h, norm skip), h + SwiGLU(norm h)."""
    model = fresh_model(dec_blocks=1, depth=1)
    seen = capture(model.decoder[0][0])
    model(**inputs())
    (h, context, skip), out = seen
    block = model.decoder[0][0].double()
    h, skip, table = h.double(), skip.double(), context.rotary.double()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turned(x: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = table[..., 0], table[..., 1]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)

    def attention(q: Tensor, k: Tensor, v: Tensor, out: nn.Linear) -> Tensor:
        q, k, v = (x.reshape(*x.shape[:2], 2, 16) for x in (q, k, v))
        weights = torch.einsum("bsae,btae->bast", turned(q), turned(k)).div(4).softmax(-1)
        return torch.einsum("bast,btae->bsae", weights, v).reshape(h.shape) @ out.weight.T + out.bias

    attn, cross, mlp = block.attn, block.cross, block.mlp
    q, k, v = (norm(h, attn.norm.weight) @ attn.function.qkv.weight.T).chunk(3, -1)
    h = h + attention(q, k, v, attn.function.out)
    k, v = (norm(skip, cross.function.skip_norm.weight) @ cross.function.kv.weight.T).chunk(2, -1)
    h = h + attention(norm(h, cross.norm.weight) @ cross.function.q.weight.T, k, v, cross.function.out)
    gate, value = (norm(h, mlp.norm.weight) @ mlp.function.up.weight.T + mlp.function.up.bias).chunk(2, -1)
    h = h + (gate * gate.sigmoid() * value) @ mlp.function.down.weight.T + mlp.function.down.bias
    torch.testing.assert_close(out.double(), h, atol=1e-5, rtol=1e-5)


def test_with_zero_gates_a_fresh_model_passes_its_stream_unchanged() -> None:
    model = fresh_model(zero_gate=True)
    first, last = capture(model.prev[0]), capture(model.post[-1])
    model(**inputs())
    assert torch.equal(first[0][0], last[1])


def test_blocks_without_output_projections_pass_the_stream_unchanged() -> None:
    model = small_model()
    for branch in (module for module in model.modules() if isinstance(module, Branch)):
        last = branch.function.down if branch.kind == "mlp" else branch.function.out
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    first, last_block = capture(model.prev[0]), capture(model.post[-1])
    model(**inputs())
    assert torch.equal(first[0][0], last_block[1])


# TREAD


def test_routed_around_tokens_come_back_bit_equal() -> None:
    model = small_model(prev_blocks=1, post_blocks=1)
    before, after, inside = capture(model.prev[-1]), capture(model.post[0]), capture(model.encoder[0][0])
    model(**inputs(), selection_rate=0.5, routing_key=torch.tensor([5, 6]))
    h_BSD, back_BSD = before[1], after[0][0]
    assert inside[0][0].shape == (2, 8 + 6, 32)
    unchanged_BS = (h_BSD == back_BSD).all(-1)
    assert unchanged_BS[:, :16].sum(1).tolist() == [8, 8]
    assert not unchanged_BS[:, 16:].any()


def test_the_u_sees_the_kept_tokens_with_their_own_positions_and_mask() -> None:
    model = small_model()
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    outside, inside = capture(model.prev[0]), capture(model.encoder[0][0])
    model(**inputs(), text_mask=mask, selection_rate=0.75, routing_key=torch.tensor([5, 6]))
    whole, kept, h_BSD = outside[0][1], inside[0][1], outside[1]
    for sample in range(2):
        for k, token in enumerate(inside[0][0][sample]):
            (origin,) = (h_BSD[sample] == token).all(-1).nonzero()[0].tolist()
            assert torch.equal(kept.position[sample, k], whole.position[sample, origin])
            assert torch.equal(kept.rotary[sample, k], whole.rotary[sample, origin])
            assert kept.padding.key_mask[sample, 0, 0, k] == whole.padding.key_mask[sample, 0, 0, origin]


def test_rate_zero_is_the_dense_model_and_keeping_all_tokens_equals_it() -> None:
    model, batch, key = small_model(), inputs(), torch.tensor([5, 6])
    dense = model(**batch)
    assert torch.equal(model(**batch, selection_rate=0.0, routing_key=key), dense)
    torch.testing.assert_close(model(**batch, selection_rate=1e-9, routing_key=key), dense, atol=1e-6, rtol=0)
    assert not torch.allclose(model(**batch, selection_rate=0.5, routing_key=key), dense)


def test_routing_without_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="routing_key"):
        small_model()(**inputs(), selection_rate=0.5)


def test_standardized_text_is_the_text_with_its_statistics_removed_and_saved_with_the_weights() -> None:
    raw, standardized = small_model(), small_model(text_features="standardized")
    mean, deviation = torch.randn(TEXT_DIM, generator=seeded(1)), torch.rand(TEXT_DIM, generator=seeded(2)) + 0.5
    standardized.text_standard.set(mean, deviation)
    raw.load_state_dict(standardized.state_dict(), strict=False)
    batch = inputs()
    expected = raw(**batch)
    torch.testing.assert_close(standardized(**batch | {"text": batch["text"] * deviation + mean}), expected)
    again = small_model(text_features="standardized")
    again.load_state_dict(standardized.state_dict())
    torch.testing.assert_close(again(**batch | {"text": batch["text"] * deviation + mean}), expected)


@pytest.mark.parametrize("deviation", [0.0, -1.0, float("nan")])
def test_statistics_that_would_divide_by_zero_are_refused(deviation: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Standardization(4).set(torch.zeros(4), torch.full((4,), deviation))


def test_the_velocity_is_not_rounded_to_bfloat16_under_autocast() -> None:
    """Guidance multiplies the rounding error of the velocities that it subtracts."""
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(**inputs())
    assert velocity.dtype == torch.float32
    assert not torch.equal(velocity, velocity.bfloat16().float())


# Invariances


def test_a_prediction_of_the_data_gives_the_velocity_that_leads_there() -> None:
    given = inputs()
    given["t_B"] = torch.tensor([0.05, 0.8])
    data_BCHW = small_model()(**given)  # the same weights, whose output is now read as the data
    velocity_BCHW = small_model(prediction="x")(**given)
    arrived_BCHW = given["x_BCHW"] - given["t_B"][:, None, None, None] * velocity_BCHW
    torch.testing.assert_close(arrived_BCHW, data_BCHW, rtol=1e-5, atol=1e-5)


def test_near_the_data_the_velocity_of_a_prediction_of_the_data_is_bounded() -> None:
    given = inputs()
    given["t_B"] = torch.zeros(2)
    error_BCHW = given["x_BCHW"] - small_model()(**given)
    torch.testing.assert_close(small_model(prediction="x")(**given), error_BCHW / 0.05)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("overrides", [{}, {"skip": "concat"}, {"text_layers": "average"}])
def test_velocity_does_not_depend_on_padding(overrides: dict[str, Any], rate: float) -> None:
    model, batch, key = small_model(**overrides), inputs(), torch.tensor([5, 6])
    unpadded = model(**batch, selection_rate=rate, routing_key=key)
    garbage = 100 * torch.randn(2, 26, TEXT_DIM, generator=seeded(3))
    padded = {**batch, "text": torch.cat([batch["text"], garbage], 1)}
    mask = (torch.arange(32) < 6).expand(2, -1)
    velocity = model(**padded, text_mask=mask, selection_rate=rate, routing_key=key)
    torch.testing.assert_close(velocity, unpadded, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(**padded, selection_rate=rate, routing_key=key), unpadded, atol=1e-2)


def test_text_that_is_all_padding_is_no_text() -> None:
    model, batch = small_model(), inputs()
    none = model(**{**batch, "text": batch["text"][:, :0]})
    torch.testing.assert_close(model(**batch, text_mask=torch.zeros(2, 6)), none, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_velocity_does_not_depend_on_the_other_samples_of_the_batch(rate: float) -> None:
    model, batch = small_model(), inputs(batch=3)
    extra = {"text_mask": torch.arange(6) < torch.tensor([[6], [2], [4]]), "routing_key": torch.tensor([5, 6, 7])}
    together = model(**batch, **extra, selection_rate=rate)
    for i in range(3):
        alone = {key: value[i : i + 1] for key, value in {**batch, **extra}.items()}
        torch.testing.assert_close(model(**alone, selection_rate=rate), together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_text_has_no_order_of_its_own() -> None:
    model, batch = small_model(), inputs()
    shuffled = batch["text"][:, torch.randperm(6, generator=seeded(4))]
    torch.testing.assert_close(model(**{**batch, "text": shuffled}), model(**batch), atol=1e-5, rtol=1e-5)


def test_moving_all_positions_by_a_constant_changes_nothing_among_image_tokens() -> None:
    """Rotary attention sees distances; only text, which stays at the origin, can tell where the picture is."""
    model, batch = small_model(), inputs()
    moved = batch["position_map"] + torch.tensor([0.3, -0.2])
    assert not torch.allclose(model(**{**batch, "position_map": moved}), model(**batch), atol=1e-3)
    batch["text"] = batch["text"][:, :0]
    torch.testing.assert_close(model(**{**batch, "position_map": moved}), model(**batch), atol=1e-4, rtol=1e-4)
    model = small_model(absolute_position="waves")
    assert not torch.allclose(model(**{**batch, "position_map": moved}), model(**batch), atol=1e-3)


def test_velocity_depends_on_every_input() -> None:
    model, batch = small_model(), inputs()
    velocity = model(**batch)
    for name in batch:
        assert not torch.allclose(model(**{**batch, name: batch[name] * 0.5}), velocity, atol=1e-4), name
    assert not torch.allclose(model(**{**batch, "aspect": None}), velocity, atol=1e-4)


# Refusals


def test_a_position_map_of_the_wrong_grid_is_refused_with_both_shapes() -> None:
    batch = inputs()
    with pytest.raises(ValueError, match=r"position_map must be \(2, 16, 2\).*got \(2, 64, 2\)"):
        small_model()(**{**batch, "position_map": torch.zeros(2, 64, 2)})
    with pytest.raises(ValueError, match=r"must be \(2, 64, 2\), one \(y, x\) per latent"):
        small_model(position_grid="latent")(**batch)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 7, 8)])
def test_latents_that_do_not_split_into_patches_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="4 channels and sides that are multiples of the patch size 2"):
        small_model()(**{**inputs(), "x_BCHW": torch.zeros(shape)})


# Training


@every_option
def test_one_batch_is_memorised(overrides: dict[str, Any]) -> None:
    """The loss of a repeated batch falls below 5% of its start within 120 steps."""
    model = fresh_model(depth=1, dec_blocks=1, prev_blocks=0, post_blocks=0, **overrides)
    batch = inputs(batch=4, side=4)
    target = torch.randn(4, 4, 4, 4, generator=seeded(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(121):
        loss = (model(**batch) - target).square().mean()
        if loss < 0.05 * target.square().mean():
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"after 120 steps the loss is {loss / target.square().mean():.2f} of its start")


@every_option
def test_bfloat16_gradients_are_finite_float32_and_near_the_float32_ones(overrides: dict[str, Any]) -> None:
    model, batch = small_model(**overrides), inputs()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        velocity = model(**batch, selection_rate=0.5, routing_key=torch.tensor([5, 6]))
        velocity.float().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradients()
    assert rounded.keys() == exact.keys() == dict(model.named_parameters()).keys()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in rounded.values())
    exact_all, rounded_all = (torch.cat([g.flatten() for g in gs.values()]) for gs in (exact, rounded))
    assert torch.cosine_similarity(exact_all, rounded_all, dim=0) > 0.99


def test_checkpointing_recomputes_blocks_and_changes_no_gradient() -> None:
    gradients, runs = {}, {}
    for checkpointing in ("none", "blocks", "all"):
        model = small_model()
        again = XUT(model.config, checkpointing=checkpointing)
        again.load_state_dict(model.state_dict())
        calls: list[int] = []
        for branch in (module for module in again.modules() if isinstance(module, Branch) and module.kind == "mlp"):
            branch.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        again(**inputs(), selection_rate=0.5, routing_key=torch.tensor([5, 6])).square().mean().backward()
        gradients[checkpointing] = [p.grad for p in again.parameters()]
        runs[checkpointing] = len(calls)
    blocks = 1 + 2 * (1 + 2) + 1
    assert runs == {"none": blocks, "blocks": blocks + blocks // 2, "all": 2 * blocks}
    for checkpointing in ("blocks", "all"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["none"], gradients[checkpointing], strict=True))


def test_text_lies_at_the_origin_whatever_the_picture_shows() -> None:
    model = small_model()
    contexts = []
    model.prev[0].register_forward_pre_hook(lambda block, args: contexts.append(args[1]))
    model(**inputs())
    [context] = contexts
    image_tokens = inputs()["position_map"].shape[1]
    assert context.position.shape[1] > image_tokens
    assert context.position[:, :image_tokens].any()
    assert not context.position[:, image_tokens:].any()


def test_time_turns_the_fastest_wave_by_one_radian_in_a_thousandth() -> None:
    embedding = TimeEmbedding(8)
    torch.nn.init.eye_(embedding.proj.weight)
    torch.nn.init.zeros_(embedding.proj.bias)
    waves = torch.tensor([1.0, 0.1, 0.01, 0.001])
    wanted = torch.cat([waves.cos(), waves.sin()])
    torch.testing.assert_close(embedding(torch.tensor([0.001]))[0], torch.nn.functional.mish(wanted))


@pytest.mark.parametrize("key", [None, torch.tensor([5]), torch.tensor([5, 6], dtype=torch.int32)])
def test_routing_without_one_whole_number_a_sample_is_refused(key: Tensor | None) -> None:
    with pytest.raises(ValueError, match="needs a routing_key, one int64 a sample"):
        small_model()(**inputs(), selection_rate=0.5, routing_key=key)


def test_unknown_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="none, blocks, all"):
        XUT(XUTConfig.tiny(), checkpointing="some")  # type: ignore[arg-type]


# Compiled


ROUTED: dict[str, Any] = {
    "text_mask": torch.arange(6) < torch.tensor([[6], [2]]),
    "routing_key": torch.tensor([5, 6]),
    "selection_rate": 0.5,
}


def _graphs(model: XUT, shapes: list[tuple[int, int]]) -> int:
    """Graphs of training steps with these (side of the latents, text tokens), each with two masks and routing keys."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled(model, backend=counter)
    for side, text_tokens in shapes:
        for seed in range(2):
            batch = inputs(side=side, text_tokens=text_tokens, seed=seed)
            mask = torch.arange(text_tokens) < torch.tensor([[seed + 1], [text_tokens]])
            key = torch.tensor([seed, 7 * seed])
            model(**batch, text_mask=mask, selection_rate=0.5, routing_key=key).square().mean().backward()
    return int(counter.frame_count)


def test_blocks_of_one_kind_share_their_graphs_at_any_depth() -> None:
    """For each shape: a plain block on all tokens, a plain one on the kept tokens, and there one whose skip is its own
    input, after the last encoder stage, and one with another skip."""
    shapes = [(4, 2)]
    assert _graphs(small_model(depth=2, dec_blocks=2), shapes) == 4 * len(shapes)
    assert _graphs(small_model(depth=3, dec_blocks=2), shapes) == 4 * len(shapes)


def test_the_limit_of_graphs_is_raised_to_what_a_run_needs_and_exceeding_it_does_not_end_the_run() -> None:
    torch._dynamo.reset()
    model, counter = small_model(depth=1, dec_blocks=1, prev_blocks=0, post_blocks=0), CompileCounter()
    expected = [model(**inputs(text_tokens=tokens)) for tokens in range(1, 6)]
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled(model, backend=counter)
        assert torch._dynamo.config.recompile_limit >= 2 * 4 * MOST_TEXT_LENGTHS
        torch._dynamo.config.recompile_limit = 2
        for tokens, velocity in enumerate(expected, start=1):
            torch.testing.assert_close(model(**inputs(text_tokens=tokens)), velocity, atol=1e-5, rtol=1e-5)
    assert counter.frame_count < 2 * len(expected)


def test_the_compiled_model_equals_eager_in_velocity_and_gradients() -> None:
    """As traced graphs with the compiler's decompositions, but without its kernels."""
    torch._dynamo.reset()
    model = small_model(depth=1, dec_blocks=1, prev_blocks=0, post_blocks=0)
    results = []
    for prepare in (lambda model: model, lambda model: compiled(model, "aot_eager_decomp_partition")):
        prepare(model).zero_grad()
        velocity = model(**inputs(), **ROUTED)
        velocity.square().mean().backward()
        results.append([velocity.detach(), *(parameter.grad for parameter in model.parameters())])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_the_compiled_kernels_of_a_block_equal_eager_in_output_and_gradients() -> None:
    """A decoder block has every kind of branch. Scalar kernels without optimisation compile in a third of the time."""
    torch._dynamo.reset()
    model = small_model(depth=1, dec_blocks=1, prev_blocks=0, post_blocks=0, rotary="learned")
    block = model.decoder[0][0]
    seen = capture(block)
    model(**inputs(), **ROUTED)
    (h, context, skip), _ = seen
    context = context._replace(shared={kind: Modulation(*map(Tensor.detach, m)) for kind, m in context.shared.items()})
    block._forward_hooks.clear()
    results = []
    with torch._inductor.config.patch({"cpp.simdlen": 1, "aot_inductor.debug_compile": True}):
        for run in (block, torch.compile(block, fullgraph=True, dynamic=False)):
            streams = [tensor.detach().requires_grad_() for tensor in (h, skip)]
            out = run(streams[0], context, streams[1])
            gradients = torch.autograd.grad(out.square().mean(), [*streams, *block.parameters()])
            results.append([out.detach(), *gradients])
    for eager, kernels in zip(*results, strict=True):
        torch.testing.assert_close(kernels, eager, atol=1e-5, rtol=1e-5)


# --- The output of one block ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_the_image_tokens_of_a_block_are_given_and_change_nothing(checkpointing: Any) -> None:
    """Blocks 1 and 8 lie outside the U, 2 and 3 are its encoder. TREAD's kept tokens have their places with them."""
    random, given = small_model(), inputs() | {"selection_rate": 0.5, "routing_key": torch.tensor([3, 4])}
    model = XUT(random.config, checkpointing)
    model.load_state_dict(random.state_dict())
    wanted = model(**given)
    index_BK = select_tokens(given["routing_key"], 16, 6, 0.5)[:, :8]
    for number, name in ((1, "prev.0"), (2, "encoder.0.0"), (3, "encoder.1.0"), (8, "post.0")):
        seen = capture(model.get_submodule(name))
        output = BlockOutput(number)
        assert torch.equal(model(**given, output=output), wanted)
        routed = number in (2, 3)
        assert output.tokens_BKD is not None
        assert torch.equal(output.tokens_BKD, seen[1][:, : 8 if routed else 16])
        assert output.tokens_BKD.requires_grad
        if routed:
            assert output.index_BK is not None
            assert torch.equal(output.index_BK, index_BK)
        else:
            assert output.index_BK is None
    dense = BlockOutput(2)
    model(**inputs(), output=dense)
    assert dense.tokens_BKD is not None
    assert (dense.tokens_BKD.shape[1], dense.index_BK) == (16, None)


def test_compiled_blocks_give_the_same_tokens() -> None:
    torch._dynamo.reset()
    eager, traced = small_model(), compiled(small_model(), backend="aot_eager")
    outputs = [BlockOutput(3), BlockOutput(3)]
    for model, output in zip((eager, traced), outputs, strict=True):
        model(**inputs(), output=output)
    torch.testing.assert_close(outputs[1].tokens_BKD, outputs[0].tokens_BKD, rtol=1e-4, atol=1e-5)
