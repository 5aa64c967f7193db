"""Axes: B batch, N patches, F features, 3 = red, green, blue."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from trainer.encoders.vision import VisionModel, load_vision_model, vision_parameters, vision_shape

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
    "intermediate_size": 32,
}  # fmt: skip
KINDS: dict[str, Any] = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SHAPE)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE)),
    "vit": lambda: ViTModel(ViTConfig(**SHAPE)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE)),
}


def save(folder: Path, kind: str, **processor: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        KINDS[kind]().save_pretrained(folder)
    config = {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255} | processor
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("vision") / "dinov2", "dinov2")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "dinov2"))


def pixels(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def test_features_are_the_last_states_of_the_patches_of_normalised_pixels(saved: Path) -> None:
    model = load_vision_model(str(saved))
    assert (model.shape.width, model.shape.patch) == (32, 7)
    x_B3HW = (pixels(28, 21) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    wanted = Dinov2Model.from_pretrained(saved)(pixel_values=x_B3HW).last_hidden_state[:, 1:]
    found = model.features(pixels(28, 21), 4, 3)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_one_feature_for_each_token_whatever_the_model_and_the_size(kind: str, tmp_path: Path) -> None:
    """The picture's four quarters differ, and a patch is most like those of its own quarter: they are in row order."""
    model = load_vision_model(str(save(tmp_path / kind, kind)))
    quarters = torch.tensor([[[0, 250], [100, 180]], [[0, 0], [250, 100]], [[0, 90], [0, 250]]], dtype=torch.uint8)
    picture = quarters.repeat_interleave(32, 1).repeat_interleave(32, 2)[None]
    features_NF = model.features(picture, 8, 8)[0]
    assert features_NF.shape == (64, 32)
    centred = features_NF - features_NF.mean(0)
    quarter_N = (torch.arange(64) // 32) * 2 + (torch.arange(64) % 8) // 4
    means = torch.stack([centred[quarter_N == number].mean(0) for number in range(4)])
    nearest = torch.cdist(centred, means).argmin(1)
    assert (nearest == quarter_N).float().mean() > 0.8


def test_pictures_are_computed_in_slices_of_a_few(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_vision_model(str(saved))
    whole = model.features(pixels(28, 28, 5), 4, 4)
    sizes: list[int] = []
    model.model.register_forward_pre_hook(lambda _, __, k: sizes.append(len(k["pixel_values"])), with_kwargs=True)
    monkeypatch.setattr("trainer.encoders.vision._PIXELS_AT_ONCE", 2 * 28 * 28)
    torch.testing.assert_close(model.features(pixels(28, 28, 5), 4, 4), whole)
    assert sizes == [2, 2, 1]


def test_parameters_are_counted_or_those_of_a_typical_model(saved: Path) -> None:
    wanted = sum(parameter.numel() for parameter in load_vision_model(str(saved)).model.parameters())
    assert vision_parameters(str(saved)) == wanted
    assert vision_parameters("nobody/no-such-model") > 1e8


def test_a_folder_that_is_no_vision_transformer_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())

    def refused(file: str, content: dict[str, Any] | None) -> str:
        before = (folder / file).read_bytes()
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_text(json.dumps(content))
        with pytest.raises(ValueError) as error:
            vision_shape(str(folder))
        (folder / file).write_bytes(before)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no hidden_size and patch_size" in refused(
        "config.json", {k: config[k] for k in config if k != "patch_size"}
    )
    assert "3 channels" in refused("config.json", config | {"num_channels": 1})
    assert "No such file" in refused("preprocessor_config.json", None)
    assert "image_mean and image_std" in refused("preprocessor_config.json", {"image_mean": MEAN})
    assert "does not scale pixels" in refused("preprocessor_config.json", {"do_rescale": False})
    with pytest.raises(ValueError, match="is not a folder"):
        vision_shape(str(tmp_path / "nothing"))


def test_incomplete_weights_are_refused_but_for_the_pooler(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    vit = save(tmp_path / "vit", "vit")
    for place, dropped, wanted in ((folder, "layernorm", "weights are missing"), (vit, "pooler", None)):
        file = place / "model.safetensors"
        save_file({k: t for k, t in load_file(file).items() if dropped not in k}, file, {"format": "pt"})
        if wanted is None:
            assert isinstance(load_vision_model(str(place)), VisionModel)
        else:
            with pytest.raises(ValueError, match=wanted):
                load_vision_model(str(place))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be used"):
        load_vision_model(str(folder))


def test_a_model_that_merges_patches_is_refused_when_it_is_used(saved: Path) -> None:
    model = load_vision_model(str(saved))
    with pytest.raises(ValueError, match="plain vision transformer"):
        VisionModel("merging", model.model, model.shape)._features(pixels(28, 28), (28, 28), patches=64)
