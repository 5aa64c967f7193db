"""muP roles, the coordinate check, Muon combined with AdamW, and the schedule."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from trainer.diffusion.positions import full_position_map
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT
from trainer.optimization.optimizers import (
    MuonAndAdamW,
    OptimizerConfig,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_roles,
    step_unless,
)

HEAD_DIM = 32


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of_width(width: int, *, rotary: str = "axial") -> XUT:
    torch.manual_seed(0)
    shape = {"heads": width // HEAD_DIM, "mlp_dim": 2 * width, "depth": 1, "dec_blocks": 1, "post_blocks": 0}
    return XUT(XUTConfig(dim=width, text_dim=16, rotary=rotary, **shape))  # type: ignore[arg-type]


def velocity(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(8, 4, 8, 8, generator=generator), torch.randn(8, 4, 16, generator=generator)
    t, aspect = torch.rand(8, generator=generator), torch.randn(8, generator=generator)
    position_map = full_position_map(64, 64, 4, 4).expand(8, -1, -1)
    out: Tensor = model(x, t, text=text, position_map=position_map, aspect=aspect)
    return out


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    target = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(steps):
        loss = (velocity(model) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Roles and rates


def test_roles_are_what_the_shapes_of_a_wider_model_say() -> None:
    """A dimension grows if it differs between two widths: the definition of muP's roles (arXiv 2203.03466)."""
    narrow, wide = model_of_width(32), model_of_width(64)
    for (name, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        grows = tuple(x != y for x, y in zip(a.shape, b.shape, strict=True))
        if a.dim() == 2:
            both = "condition" if {"time_in", "aspect_out", "adaln"} & set(name.split(".")) else "hidden"
            wanted = {(True, True): both, (True, False): "input", (False, True): "output"}[grows]
            wanted = "text" if name == "text_in.weight" else wanted
        else:
            wanted = "vector"
        assert parameter_roles(narrow)[name] == wanted, name


def test_rates_follow_the_fan_in_and_decay_is_for_matrices() -> None:
    model = model_of_width(64)
    config = OptimizerConfig(learning_rate=1e-3, base_width=128, weight_decay=0.02)
    groups = build_optimizer(model, config).param_groups
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(of) == len(list(model.parameters()))
    block = model.prev[0]
    for parameter, rate, decay in [
        (block.attn.function.qkv.weight, 2e-3, 0.02),
        (block.mlp.function.down.weight, 1e-3, 0.02),
        (model.adaln["attn"].out.weight, 0.5e-3, 0.02),
        (model.patch_out.weight, 2e-3, 0.02),
        (model.patch_in.weight, 1e-3, 0.02),
        (model.text_in.weight, 8e-3, 0.02),
        (block.attn.norm.weight, 1e-3, 0.0),
        (model.patch_out.bias, 1e-3, 0.0),
    ]:
        group = of[id(parameter)]
        assert (group["lr"], group["weight_decay"]) == (rate, decay)
    assert len(groups) <= 7
    assert all(group["fused"] for group in groups)


def test_learned_frequencies_are_vectors_and_frozen_ones_stay_out() -> None:
    model = model_of_width(64, rotary="learned")
    name = "prev.0.attn.function.log_frequency"
    assert parameter_roles(model)[name] == "vector"
    frequency = model.get_parameter(name).requires_grad_(False)
    assert parameter_roles(model)[name] == "frozen"
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    assert all(frequency is not parameter for group in groups for parameter in group["params"])


# The coordinate check


def changes_by_width(widths: list[int], optimizer_of: object) -> dict[str, list[float]]:
    """RMS change of every activation after four steps, for each width."""
    changes: dict[str, list[float]] = {}
    for width in widths:
        model = model_of_width(width)
        seen: dict[str, Tensor] = {}
        layers = {"prev": model.prev[0], "encoder": model.encoder[0][0], "decoder": model.decoder[0][0]}
        for name, layer in (layers | {"condition": model.time_in, "velocity": model.patch_out}).items():
            layer.register_forward_hook(
                lambda module, args, out, name=name, seen=seen: seen.update({name: out.detach()})
            )
        velocity(model)
        before = dict(seen)
        train(model, optimizer_of(model), steps=4)  # type: ignore[operator]
        velocity(model)
        for name in seen:
            changes.setdefault(name, []).append((seen[name] - before[name]).square().mean().sqrt().item())
    return changes


def slope(values: list[float]) -> float:
    """Mean increase of log2(value) per doubling of the width."""
    return math.log2(values[-1] / values[0]) / (len(values) - 1)


@pytest.mark.parametrize(("kind", "widths"), [("adamw", [64, 128, 256, 512]), ("muon", [64, 128, 256])])
def test_activations_move_equally_far_at_every_width(kind: str, widths: list[int]) -> None:
    config = OptimizerConfig(kind=kind, learning_rate=2e-3, base_width=64)  # type: ignore[arg-type]
    for name, values in changes_by_width(widths, lambda model: build_optimizer(model, config)).items():
        assert abs(slope(values)) < 0.2, (name, values)


def test_with_one_rate_for_all_activations_move_further_in_wider_models() -> None:
    """Shows that the coordinate check detects a wrong scaling."""
    for name, values in changes_by_width([64, 128, 256], lambda model: AdamW(model.parameters(), lr=2e-4)).items():
        assert slope(values) > 0.7, (name, values)


@pytest.mark.parametrize("text_rms", [1.0, 3.0])
@pytest.mark.parametrize("text_dim", [16, 128, 1024])
def test_projected_text_keeps_its_scale_for_every_text_encoder(text_dim: int, text_rms: float) -> None:
    """Hidden states of a language model have a common mean, along which all steps add up."""
    torch.manual_seed(0)
    shape = {"dim": 256, "heads": 8, "mlp_dim": 512, "depth": 1, "dec_blocks": 1, "post_blocks": 0}
    model = XUT(XUTConfig(text_dim=text_dim, **shape))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(8, 4, text_dim, generator=generator) + torch.randn(text_dim, generator=generator)
    text *= text_rms / text.square().mean().sqrt()
    x, target = (torch.randn(8, 4, 8, 8, generator=generator) for _ in range(2))
    t, position_map = torch.rand(8, generator=generator), full_position_map(64, 64, 4, 4).expand(8, -1, -1)
    optimizer = build_optimizer(model, OptimizerConfig())  # at the peak of the schedule

    def scale() -> float:
        projected: Tensor = model.text_in(text)
        return projected.square().mean().sqrt().item()

    before = scale()
    for _ in range(20):
        optimizer.zero_grad()
        (model(x, t, text=text, position_map=position_map) - target).square().mean().backward()
        optimizer.step()
    assert scale() < 1.7 * before


# Training


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_resumed_from_a_state_dict_is_bit_equal(kind: str) -> None:
    config = OptimizerConfig(kind=kind)  # type: ignore[arg-type]
    model = model_of_width(32)
    optimizer = build_optimizer(model, config)
    train(model, optimizer, steps=2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    wanted = train(model, optimizer, steps=3)

    again = model_of_width(32)
    resumed = build_optimizer(again, config)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert train(again, resumed, steps=3) == wanted
    assert wanted[-1] < wanted[0]


def test_muon_moves_hidden_matrices_by_an_orthogonal_step() -> None:
    """One step changes a hidden matrix by a multiple of a nearly orthogonal one; AdamW has all other parameters."""
    model = model_of_width(64)
    config = OptimizerConfig(kind="muon", weight_decay=0.0, muon_learning_rate=0.01)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, MuonAndAdamW)
    train(model, optimizer, steps=1)  # after the first step only the zero output projection has changed
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, optimizer, steps=1)
    for name, role in parameter_roles(model).items():
        step = model.get_parameter(name).detach() - before[name]
        if role != "hidden":
            least_fan_in = 16 if role == "text" else 64
            assert step.abs().max() < 2.01 * config.learning_rate * 128 / least_fan_in, name
        elif name == "prev.0.attn.function.out.weight":
            singular = torch.linalg.svdvals(step) / 0.01
            # The Newton-Schulz iteration of Muon ends between 0.7 and 1.2, where the gradient has full rank.
            assert 0.5 < singular.median() < 1.3
            assert singular.max() < 1.3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_with_non_finite_gradients_can_be_skipped(kind: str) -> None:
    model = model_of_width(32)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind))  # type: ignore[arg-type]
    train(model, optimizer, steps=2)
    before = copy.deepcopy((model.state_dict(), optimizer_tensors(optimizer, model)))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    step_unless(torch.tensor(True), optimizer)
    after = (model.state_dict(), optimizer_tensors(optimizer, model))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    train(model, optimizer, steps=1)
    step_unless(torch.tensor(False), optimizer)
    assert not torch.equal(model.patch_out.weight, before[0]["patch_out.weight"])


def test_state_is_saved_under_the_names_of_the_parameters() -> None:
    model = model_of_width(32)
    optimizer = build_optimizer(model, OptimizerConfig(kind="muon"))
    assert optimizer_tensors(optimizer, model) == {}, "before the first step there is none"
    train(model, optimizer, steps=1)
    tensors = optimizer_tensors(optimizer, model)
    of_adamw = {"exp_avg", "exp_avg_sq", "step"}
    wanted = {
        f"{name}.{key}"
        for name, role in parameter_roles(model).items()
        for key in ({"momentum"} if role == "hidden" else of_adamw)
    }
    assert tensors.keys() == wanted


def test_the_state_of_a_wider_model_or_a_part_of_it_is_refused() -> None:
    wide, narrow = model_of_width(64), model_of_width(32)
    optimizer = build_optimizer(wide, OptimizerConfig())
    train(wide, optimizer, steps=1)
    tensors = optimizer_tensors(optimizer, wide)
    with pytest.raises(ValueError, match=r"of its tensors do not fit, such as adaln\.attn\.hidden\.bias\.exp_avg"):
        load_optimizer_tensors(build_optimizer(narrow, OptimizerConfig()), narrow, tensors)
    del tensors["patch_out.bias.exp_avg"]
    with pytest.raises(ValueError, match=r"2 of its tensors do not fit, such as patch_out\.bias\.exp_avg_sq"):
        load_optimizer_tensors(optimizer, wide, tensors)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="adamw or muon: got 'sgd'"):
        OptimizerConfig(kind="sgd")  # type: ignore[arg-type]
