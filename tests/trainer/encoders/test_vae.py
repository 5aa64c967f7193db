"""Axes: B batch, C latent channels, H W pixel rows and columns, h w latent rows and columns, 3 = red, green, blue."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.encoders import vae
from trainer.encoders.load_codec import attend_by_matmul, codec_shape, load_codec
from trainer.encoders.vae import VaeCodec, latent_statistics

WEIGHTS = "diffusion_pytorch_model.safetensors"
# SDXL's scaling_factor, which says nothing of single channels.
SCALE = 0.13025
HDM_MEAN = (-3.8660, -1.3354, 0.8354, 0.9099)
HDM_STD = (10.0365, 6.8484, 7.2138, 5.5913)


@pytest.fixture(scope="module")
def reference() -> AutoencoderKL:
    """SDXL's layout, small: four blocks, so 8 pixels along a latent, with 4 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=SCALE,
        ).eval()


@pytest.fixture(scope="module")
def saved(reference: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "some-vae"
    reference.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "some-vae"))


def load(folder: Path) -> VaeCodec:
    codec = load_codec(str(folder))
    assert isinstance(codec, VaeCodec)
    return codec


def set_config(folder: Path, **values: Any) -> dict[str, Any]:
    """Changes values in the folder's config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return config


def noise(batch: int = 2, height: int = 32, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def posterior_mean(reference: AutoencoderKL, pixels_B3HW: Tensor) -> Tensor:
    mode: Tensor = reference.encode(pixels_B3HW.float() / 127.5 - 1).latent_dist.mode()
    return mode


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


# --- encode and decode ----------------------------------------------------------------------------------------------


def test_latents_are_the_scaled_mean_of_diffusers_own_posterior(reference: AutoencoderKL, saved: Path) -> None:
    latents_BChw = load(saved).encode(noise())
    assert latents_BChw.shape == (2, 4, 4, 6)
    assert latents_BChw.dtype == torch.float32
    torch.testing.assert_close(latents_BChw, posterior_mean(reference, noise()) * SCALE, atol=1e-5, rtol=0)


def test_pictures_are_diffusers_own_decoding(reference: AutoencoderKL, saved: Path) -> None:
    latents_BChw = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x_B3HW = reference.decode(latents_BChw / SCALE).sample
    pictures = load(saved).decode(latents_BChw)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (2, 3, 32, 48)
    # Half a step of the rounding to bytes, and the clamp.
    values = (x_B3HW.clamp(-1, 1) + 1) * 127.5
    assert (pictures - values).abs().max() < 0.5 + 1e-3
    assert len(pictures.unique()) > 50


def test_mean_and_deviation_of_each_channel_come_from_the_config(reference: AutoencoderKL, folder: Path) -> None:
    mean, std = (0.5, -1.0, 2.0, 0.0), (1.0, 2.0, 3.0, 4.0)
    set_config(folder, latents_mean=mean, latents_std=std)
    codec = load(folder)
    expected = (posterior_mean(reference, noise()) - column(mean)) / column(std)
    torch.testing.assert_close(codec.encode(noise()), expected, atol=1e-5, rtol=0)


def test_a_shift_factor_is_taken_off_before_scaling(reference: AutoencoderKL, folder: Path) -> None:
    set_config(folder, scaling_factor=1.5, shift_factor=0.25)
    codec = load(folder)
    expected = (posterior_mean(reference, noise()) - 0.25) * 1.5
    torch.testing.assert_close(codec.encode(noise()), expected, atol=1e-5, rtol=0)


def test_the_vae_of_hdm_has_hdms_statistics(reference: AutoencoderKL, saved: Path, tmp_path: Path) -> None:
    codec = load(Path(shutil.copytree(saved, tmp_path / "EQ-SDXL-VAE")))
    expected = (posterior_mean(reference, noise()) - column(HDM_MEAN)) / column(HDM_STD)
    torch.testing.assert_close(codec.encode(noise()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("statistics", ["scaling", "channels"])
def test_decoding_takes_the_statistics_back(reference: AutoencoderKL, folder: Path, statistics: str) -> None:
    if statistics == "channels":
        set_config(folder, latents_mean=HDM_MEAN, latents_std=HDM_STD)
    codec = load(folder)
    with torch.no_grad():
        x_B3HW = reference.decode(posterior_mean(reference, noise())).sample
    error = codec.decode(codec.encode(noise())) - (x_B3HW.clamp(-1, 1) + 1) * 127.5
    assert error.abs().max() < 0.5 + 1e-2


def test_a_batch_is_encoded_as_its_pictures_are_one_by_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, pixels = load(saved), noise(5)
    one_by_one = torch.cat([codec.encode(pixels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(codec.encode(pixels), one_by_one, atol=1e-5, rtol=0)
    runs = []
    monkeypatch.setattr(vae, "_PIXELS_AT_ONCE", 2 * 32 * 48)
    codec.vae.encoder.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    torch.testing.assert_close(codec.encode(pixels), one_by_one, atol=1e-5, rtol=0)
    assert runs == [2, 2, 1]
    assert codec.encode(noise(1, 64, 64)).shape == (1, 4, 8, 8)  # more than the limit, but one cannot be split


def test_attention_by_matrix_products_equals_torchs(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, pixels = load(saved), noise(5)
    expected = codec.encode(pixels)
    attend_by_matmul(codec.vae)
    runs = []
    monkeypatch.setattr(vae, "_SCORES_AT_ONCE", 2 * (32 * 48 // 64) ** 2)
    codec.vae.encoder.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    torch.testing.assert_close(codec.encode(pixels), expected, atol=1e-5, rtol=0)
    assert runs == [2, 2, 1]
    processors = [type(each.processor).__name__ for each in codec.vae.encoder.mid_block.attentions]
    assert processors == ["AttnProcessor"]


def test_the_memory_layout_of_the_pixels_makes_no_difference(saved: Path) -> None:
    codec, pixels = load(saved), noise()
    as_read = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(codec.encode(as_read), codec.encode(pixels), atol=1e-5, rtol=0)
    convolutions = [module for module in codec.vae.modules() if isinstance(module, nn.Conv2d)]
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in convolutions)


def test_the_vae_is_frozen_and_weighs_all_channels_alike(saved: Path) -> None:
    codec = load(saved).train()
    assert not any(p.requires_grad for p in codec.parameters())
    assert not codec.encode(noise()).requires_grad
    assert torch.equal(codec.loss_weight_C, torch.ones(4))


def test_half_precision_is_that_of_the_weights_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as as_on_a_gpu:
        as_on_a_gpu.setattr("trainer.encoders.load_codec.frozen_dtype", lambda device: torch.bfloat16)
        codec = load_codec(str(saved), compiled=True)  # which means nothing without a GPU
    assert isinstance(codec, VaeCodec)
    assert codec.vae.dtype == torch.bfloat16
    latents_BChw = codec.encode(noise())
    assert latents_BChw.dtype == torch.float32
    assert codec.decode(latents_BChw).dtype == torch.uint8
    torch.testing.assert_close(latents_BChw, load(saved).encode(noise()), atol=0.02, rtol=0)


def test_sides_that_are_no_multiple_of_the_factor_are_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"20 x 16 pixels.*some-vae.*multiples of 8"):
        load(saved).encode(noise(1, 16, 20))


# --- statistics -----------------------------------------------------------------------------------------------------

SDXL = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "scaling_factor": SCALE}


@pytest.mark.parametrize(
    "name",
    [
        "KBlueLeaf/EQ-SDXL-VAE",
        "mirror/eq-sdxl-vae",
        "/models/EQ-SDXL-VAE",
        "/root/.cache/huggingface/hub/models--KBlueLeaf--EQ-SDXL-VAE/snapshots/0123abcd",
    ],
)
def test_eq_sdxl_vae_is_known_by_its_name(name: str) -> None:
    found = latent_statistics(name, SDXL)
    assert (found.mean, found.std) == (HDM_MEAN, HDM_STD)


def test_eq_sdxl_vae_is_known_by_what_its_config_was_saved_from() -> None:
    assert latent_statistics("/models/mine", {**SDXL, "_name_or_path": "KBlueLeaf/EQ-SDXL-VAE"}).mean == HDM_MEAN


@pytest.mark.parametrize("name", ["stabilityai/sdxl-vae", "/models/EQ-SDXL-VAE/other", "me/EQ-SDXL-VAE-2"])
def test_other_vaes_of_the_same_layout_keep_their_scaling_factor(name: str) -> None:
    found = latent_statistics(name, SDXL)
    assert found.mean == (0.0,) * 4
    assert found.std == pytest.approx((1 / SCALE,) * 4)


def test_a_name_does_not_overrule_a_config_that_says_more_or_is_of_another_layout() -> None:
    said = {**SDXL, "latents_mean": [1, 2, 3, 4], "latents_std": [1, 1, 1, 1]}
    assert latent_statistics("KBlueLeaf/EQ-SDXL-VAE", said).mean == (1, 2, 3, 4)
    assert latent_statistics("me/EQ-SDXL-VAE", {**SDXL, "latent_channels": 16}).std == pytest.approx((1 / SCALE,) * 16)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"latents_mean": [0.0] * 4}, "must both be 4 numbers"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "must both be 4 numbers"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "deviations above 0"),
        ({"scaling_factor": None}, "does not say how to normalise.*write latents_mean and latents_std, 4 numbers"),
        ({"scaling_factor": 0.0}, "does not say how to normalise"),
        ({"scaling_factor": "large"}, "does not say how to normalise"),
    ],
)
def test_statistics_are_never_guessed(folder: Path, values: dict[str, Any], why: str) -> None:
    set_config(folder, **values)
    with pytest.raises(ValueError, match=rf"some-vae.*{why}"):
        load(folder)


# --- load -----------------------------------------------------------------------------------------------------------


def test_the_shape_is_known_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert codec_shape(str(folder)) == (4, 8)
    set_config(folder, latent_channels=16, block_out_channels=[8, 8])
    assert codec_shape(str(folder)) == (16, 2)


def test_a_pipelines_folder_is_searched_for_its_vae(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "config.json").write_text('{"_class_name": "SomePipeline"}')
    assert codec_shape(str(tmp_path / "pipeline")) == (4, 8)
    assert torch.equal(load(tmp_path / "pipeline").encode(noise()), load(saved).encode(noise()))


def test_a_folder_is_loaded_without_network_output_or_random_draws(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"connects to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = torch.get_rng_state()
    load(saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def cut_short(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), rf"has no {WEIGHTS}.*Download it again"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin"), f"has no {WEIGHTS}"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "cannot be loaded.*Download both again"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 999), "cannot be loaded.*Download both again"),
        (cut_short, "cannot be loaded.*Download both again"),
        (
            lambda folder: change_weights(folder, lambda weights: weights.pop("decoder.conv_in.bias")),
            r"1 weights .* not in .*such as decoder\.conv_in\.bias",
        ),
        (
            lambda folder: change_weights(folder, lambda w: w.update({"decoder.conv_in.bias": torch.zeros(3)})),
            "cannot be loaded.*Download both again",
        ),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json.*save_pretrained"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not of a diffusers AutoencoderKL"),
        (lambda folder: set_config(folder, _class_name="AutoencoderDC"), "that of AutoencoderDC"),
        (lambda folder: set_config(folder, latent_channels=None), "has no latent_channels"),
        (lambda folder: set_config(folder, in_channels=1), "needs 3: red, green, blue"),
        (lambda folder: set_config(folder, norm_num_groups=5), "cannot be loaded"),
        (lambda folder: set_config(folder, act_fn="no such"), "cannot be loaded"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(
    folder: Path, damage: Callable[[Path], object], why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=rf"the codec .*some-vae.*{why}") as refused:
        load(folder)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")
