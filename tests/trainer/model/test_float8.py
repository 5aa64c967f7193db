"""Float8 matrix products, emulated: which layers have them, what they round, and that the weights stay plain."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.diffusion.positions import full_position_map
from trainer.model import float8
from trainer.model.config import XUTConfig
from trainer.model.float8 import use_float8
from trainer.model.xut import XUT, compiled

ROOT = Path(__file__).parents[3]
SHAPE: dict[str, Any] = {"dim": 32, "heads": 2, "mlp_dim": 48, "depth": 1, "dec_blocks": 1, "post_blocks": 1}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(checkpointing: Any = "none", **overrides: Any) -> XUT:
    """All weights are random, so that no zero initialisation hides an effect."""
    torch.manual_seed(0)
    built = XUT(XUTConfig(**(SHAPE | {"text_dim": 16} | overrides)), checkpointing)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x_BCHW": torch.randn(2, 4, 8, 8, generator=generator),
        "t_B": torch.rand(2, generator=generator),
        "text": torch.randn(2, 5, 16, generator=generator),
        "position_map": full_position_map(64, 64, 4, 4).expand(2, -1, -1),
    }


def gradients(built: XUT) -> dict[str, Tensor]:
    built.zero_grad()
    built(**inputs()).square().sum().backward()
    return {name: parameter.grad for name, parameter in built.named_parameters() if parameter.grad is not None}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def float8_layers(built: XUT) -> list[str]:
    return [name for name, module in built.named_modules() if type(module).__name__ == "Float8Linear"]


def test_all_linear_layers_of_the_blocks_are_converted_except_adaln() -> None:
    built = model(adaln="per_layer")
    assert use_float8(built, emulate=True) == len(float8_layers(built))
    per_block = ["attn.function.out", "attn.function.qkv", "mlp.function.down", "mlp.function.up"]
    cross = ["cross.function.kv", "cross.function.out", "cross.function.q"]
    names = {"prev.0": [], "encoder.0.0": [], "decoder.0.0": cross, "post.0": []}
    wanted = {f"{block}.{layer}" for block, more in names.items() for layer in per_block + more}
    assert set(float8_layers(built)) == wanted


def test_layers_whose_dimensions_are_no_multiples_of_16_stay_as_they_are() -> None:
    built = model(mlp_dim=40)
    use_float8(built, emulate=True)
    left = {name.rpartition(".")[2] for name in float8_layers(built)}
    assert "up" in left, "32 -> 2 * 40"
    assert "down" not in left, "40 -> 32"


def test_names_values_and_types_of_the_weights_do_not_change() -> None:
    plain, built = model(), model()
    use_float8(built, emulate=True)
    torch.testing.assert_close(dict(built.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert list(built.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(built.state_dict())
    built.load_state_dict(plain.state_dict())


def test_a_product_and_its_gradients_are_off_by_the_rounding_of_float8() -> None:
    """Numbers with 3 bits after the leading one (e4m3) are off by 2.6% on average, with 2 bits (e5m2) by twice that,
    and the errors of a sum's terms cancel no better than the terms."""
    name, generator = "prev.0.mlp.function.up", torch.Generator().manual_seed(2)
    x, towards = (torch.randn(64, width, generator=generator) for width in (32, 96))
    found = []
    for converted in (False, True):
        built = model()
        if converted:
            use_float8(built, emulate=True)
        layer, at = built.get_submodule(name), x.clone().requires_grad_()
        out = layer(at)
        out.backward(towards)
        assert at.grad is not None
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32
        found.append((out.detach(), at.grad, layer.weight.grad))
    out, at_input, at_weight = (error(rounded, exact) for exact, rounded in zip(*found, strict=True))
    assert 0.01 < out < 0.06
    assert 0.02 < at_input < 0.1
    assert 0.02 < at_weight < 0.1


def test_as_on_a_gpu_inputs_are_bfloat16_and_gradients_float32() -> None:
    """torchao asks for the autocast of GPUs only; its products then mix bfloat16 inputs with float32 weights."""
    built = model()
    use_float8(built, emulate=True)
    layer = built.get_submodule("prev.0.mlp.function.up")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        out = layer(torch.randn(2, 5, 32))
        out.float().square().sum().backward()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert out.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_recomputed_blocks_give_the_same_gradients() -> None:
    kept, recomputed = model(), model("all")
    for built in (kept, recomputed):
        use_float8(built, emulate=True)
    torch.testing.assert_close(gradients(recomputed), gradients(kept), rtol=0, atol=0)


def test_compiled_blocks_give_the_same_gradients() -> None:
    torch._dynamo.reset()
    eager, traced = model(), model()
    for built in (eager, traced):
        use_float8(built, emulate=True)
    compiled(traced, backend="aot_eager")
    torch.testing.assert_close(gradients(traced), gradients(eager), rtol=1e-4, atol=1e-5)


def test_a_cpu_an_old_gpu_and_a_missing_torchao_are_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the device is cpu: set fp8=false"):
        use_float8(model())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    with pytest.raises(ValueError, match=r"8\.9 or higher.*RTX 3090 has 8\.6: set fp8=false"):
        float8._check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    float8._check_device(torch.device("cuda"))
    monkeypatch.setattr(float8, "find_spec", lambda name: importlib.util.find_spec("no_such_package"))
    with pytest.raises(ValueError, match=r"pip install -c deploy/constraints.txt -e \"\.\[fp8\]\""):
        use_float8(model())


def test_an_installed_torchao_does_not_fill_the_terminal_of_every_job() -> None:
    """transformers and diffusers import it too, and on a machine without a GPU it warns of kernels that do not load."""
    code = (
        "import trainer.encoders.load_codec, trainer.encoders.text, transformers.quantizers.auto, sys\n"
        "from diffusers import AutoencoderKL\n"
        "assert 'torchao' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
