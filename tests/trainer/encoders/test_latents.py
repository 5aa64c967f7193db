"""Axes: B batch, C latent channels, H W pixel rows and columns, P values of a block, 3 = red, green, blue."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.drawings.illustrations import compose
from pipeline.drawings.painting import draw, encode
from pipeline.pictures.crops import Crop, square_crop
from trainer.encoders.latents import LinearCodec, dct_basis
from trainer.encoders.load_codec import codec_shape, load_codec


def noise(batch: int = 2, height: int = 16, width: int = 24) -> Tensor:
    """Uniformly random bytes, the hardest picture for a lossy codec."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def soft_pictures() -> Tensor:
    """Low contrast, so that neither the projection nor its rounding reaches 0 or 255."""
    return (noise() // 4) + 96


def sample_crops(count: int) -> Tensor:
    """64-pixel training crops of the drawn sample pictures."""
    generator, crops = np.random.default_rng(1), []
    for index in range(count):
        scene = compose(seed=2, index=index)
        crop = square_crop(encode(draw(scene), scene), 64, *generator.random(2))
        assert isinstance(crop, Crop)
        crops.append(torch.from_numpy(crop.pixels_HWC).permute(2, 0, 1))
    return torch.stack(crops)


def everything_kept() -> LinearCodec:
    return LinearCodec("all", dct_basis((15, 15, 15)), torch.zeros(192), torch.ones(192))


def test_the_whole_basis_is_orthonormal() -> None:
    basis_CP = dct_basis((15, 15, 15))
    assert basis_CP.shape == (192, 192)
    torch.testing.assert_close(basis_CP @ basis_CP.T, torch.eye(192), atol=5e-6, rtol=0)


def test_dct_keeps_the_lowest_frequencies_of_each_colour_axis() -> None:
    basis_CP, codec = dct_basis((15, 15, 15)), load_codec("dct")
    assert isinstance(codec, LinearCodec)
    assert codec.channels == 16
    assert codec.factor == 8
    torch.testing.assert_close(codec.basis_CP, basis_CP[[*range(10), *range(64, 67), *range(128, 131)]])


def test_a_coefficient_is_the_textbook_cosine_sum() -> None:
    pixels, codec = noise(1, 8, 8), load_codec("dct")
    assert isinstance(codec, LinearCodec)
    luma = (pixels[0].double() / 127.5 - 1).sum(0) / 3**0.5
    # Channel 4 is the frequency (1, 1), between (2, 0) and (0, 2) on the zigzag.
    angle = torch.pi * (2 * torch.arange(8, dtype=torch.float64) + 1) / 16
    by_hand = (luma * angle.cos()[:, None] * angle.cos()).sum() / 4
    scaled = codec.encode(pixels) * codec.std_C11 + codec.mean_C11
    assert scaled[0, 4, 0, 0].item() == pytest.approx(by_hand.item(), abs=1e-5)


@pytest.mark.parametrize("codec", [load_codec("pixel"), everything_kept()], ids=lambda codec: codec.name)
def test_a_codec_that_keeps_everything_returns_every_byte(codec: LinearCodec) -> None:
    assert torch.equal(codec.decode(codec.encode(noise())), noise())


def test_dct_returns_the_nearest_picture_that_its_channels_hold() -> None:
    codec, pixels = load_codec("dct"), soft_pictures()
    decoded = codec.decode(codec.encode(pixels))
    # Apart from rounding to bytes, the remainder has no component in any channel.
    leftover = codec.encode(decoded) - codec.encode(pixels)
    assert isinstance(codec, LinearCodec)
    rounding = 1 / 127.5 / 12**0.5  # deviation, in a pixel and so, orthonormally, in a coefficient
    assert (leftover * codec.std_C11).abs().max() < 5 * rounding
    # The second round trip moves a byte by its rounding at most.
    again = codec.decode(codec.encode(decoded))
    assert (again.int() - decoded.int()).abs().max() <= 1
    assert (decoded.int() - pixels.int()).abs().max() > 10


def test_a_flat_picture_survives_whole() -> None:
    pixels = torch.tensor([200, 30, 90], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 16, 8)
    codec = load_codec("dct")
    assert torch.equal(codec.decode(codec.encode(pixels)), pixels)


def test_each_block_has_its_own_latent() -> None:
    codec, pixels = load_codec("dct"), noise()
    moved = pixels.clone()
    moved[:, :, 8:16, 16:24] = 0
    changed = (codec.encode(pixels) != codec.encode(moved)).any(dim=1)
    assert changed.nonzero().tolist() == [[0, 1, 2], [1, 1, 2]]


def test_latents_do_not_depend_on_the_memory_layout_of_the_pixels() -> None:
    pixels, codec = noise(), load_codec("dct")
    channels_last = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(codec.encode(channels_last), codec.encode(pixels))


def test_latents_of_the_sample_pictures_have_zero_mean_and_unit_variance() -> None:
    latents_CN = load_codec("dct").encode(sample_crops(400)).transpose(0, 1).flatten(1)
    assert latents_CN.mean(1).abs().max() < 0.15
    assert (latents_CN.std(1) - 1).abs().max() < 0.15


def test_dct_keeps_the_sample_pictures_at_24_decibels() -> None:
    crops, codec = sample_crops(200), load_codec("dct")
    error = (codec.decode(codec.encode(crops)).float() - crops).square().mean()
    assert 10 * torch.log10(255**2 / error) > 24


def test_the_loss_weighs_channels_by_the_root_of_their_deviation() -> None:
    codec = load_codec("dct")
    assert isinstance(codec, LinearCodec)
    assert codec.loss_weight_C.mean().item() == pytest.approx(1)
    ratio = codec.loss_weight_C.square() / codec.std_C11.flatten()
    torch.testing.assert_close(ratio, ratio[0].expand(16))
    assert torch.equal(load_codec("pixel").loss_weight_C, torch.ones(3))


def test_sides_that_are_no_multiple_of_the_block_are_refused() -> None:
    with pytest.raises(ValueError, match=r"20 x 16 pixels.*dct.*multiples of 8"):
        load_codec("dct").encode(noise(1, 16, 20))


@pytest.mark.parametrize("load", [load_codec, codec_shape])
def test_an_unknown_codec_is_refused_with_the_names_there_are(load: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"'jpeg'.*dct, pixel.*KBlueLeaf/EQ-SDXL-VAE"):
        load("jpeg")


@pytest.mark.parametrize(("name", "shape"), [("dct", (16, 8)), ("pixel", (3, 1))])
def test_the_shape_is_known_before_loading(name: str, shape: tuple[int, int]) -> None:
    codec = load_codec(name)
    assert codec_shape(name) == (codec.channels, codec.factor) == shape


@pytest.mark.parametrize("load", [load_codec, codec_shape])
def test_a_name_that_is_found_nowhere_is_refused_with_an_example(
    load: Callable[[str], object], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-vae", "/not/a/folder"):
        with pytest.raises(ValueError, match=rf"{name}.*is not a folder.*KBlueLeaf/EQ-SDXL-VAE") as refused:
            load(name)
        assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")
