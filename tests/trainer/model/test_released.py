"""The public weights: reproduced, renamed without loss, refused if they do not fit."""

import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.diffusion.positions import camera, full_position_map
from trainer.model import released
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT

RELEASE = Path(__file__).parents[3].parent / "shared" / "data" / "hdm-release-tiny"
needs_release = pytest.mark.skipif(
    not RELEASE.is_dir(), reason="no ../shared/data/hdm-release-tiny beside the repository"
)

FIELDS: dict[str, Any] = {
    "patch_size": 2,
    "input_dim": 4,
    "ctx_size": 8,
    "tread_config": {"prev_trns_depth": 1, "post_trns_depth": 2, "dropout_ratio": 0.5},
    "addon_info_embs_dim": 1,
    "dim": 32,
    "ctx_dim": 24,
    "heads": 2,
    "dim_head": 16,
    "mlp_dim": 80,
    "depth": 2,
    "enc_blocks": 1,
    "dec_blocks": 2,
}


def load(weights: Path, config_path: Path) -> XUT:
    """The model of a release, in float32."""
    config = released.read_config(config_path)
    tensors = released.from_released(released.read_tensors(weights), config)
    model = XUT(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items() if not name.startswith("vae.")})
    return model


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(FIELDS | changes))
    return path


def random_release(folder: Path) -> tuple[Path, Path]:
    """A random checkpoint in the release's layout, float16, with a decoder."""
    config_path = write_config(folder)
    config = released.read_config(config_path)
    state = {key: tensor.half() for key, tensor in XUT(config).state_dict().items()}
    weights = folder / "weights.safetensors"
    save_file(released.to_released(state, config) | {"vae.decoder.bias": torch.ones(3)}, weights)
    return weights, config_path


@needs_release
@pytest.mark.parametrize(
    ("positions", "wanted"), [("position_map", "velocity"), ("camera_position_map", "camera_velocity")]
)
def test_released_weights_give_the_released_velocity(positions: str, wanted: str) -> None:
    model = load(RELEASE / "weights.safetensors", RELEASE / "config.json")
    io = load_file(RELEASE / "io.safetensors")
    with torch.no_grad():
        velocity = model(io["x"], io["t"], text=io["ctx"], position_map=io[positions], aspect=io["aspect"])
    torch.testing.assert_close(velocity, io[wanted], atol=1e-4, rtol=0)


@needs_release
def test_our_released_convention_makes_the_released_position_maps() -> None:
    io = load_file(RELEASE / "io.safetensors")
    ours = full_position_map(12 * 8, 16 * 8, 16, 12, convention="released")
    torch.testing.assert_close(ours.expand(2, -1, -1), io["position_map"])
    # Any camera is y' = (y + y_shift) / zoom: recover it from the file's two corners and apply ours.
    first, last = io["camera_position_map"][0, 0], io["camera_position_map"][0, -1]
    zoom = ((ours[-1] - ours[0]) / (last - first))[0].item()
    y_shift, x_shift = (first * zoom - ours[0]).tolist()
    torch.testing.assert_close(camera(ours, x_shift, y_shift, zoom), io["camera_position_map"][0])


@needs_release
def test_round_trip_of_the_released_weights_is_byte_equal() -> None:
    config = released.read_config(RELEASE / "config.json")
    tensors = load_file(RELEASE / "weights.safetensors")
    back = released.to_released(released.from_released(tensors, config), config)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_round_trip_keeps_half_precision_bytes_and_the_decoder(tmp_path: Path) -> None:
    weights, config_path = random_release(tmp_path)
    config, tensors = released.read_config(config_path), load_file(weights)
    ours = released.from_released(tensors, config)
    back = released.to_released(ours, config)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor)
    load(weights, config_path)
    assert set(XUT(config).state_dict()) == ours.keys() - {"vae.decoder.bias"}


def test_every_key_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    weights, config_path = random_release(tmp_path)
    tensors = load_file(weights)
    del tensors["unet.model.ctx_proj.bias"], tensors["unet.model.time_emb.freqs"]
    tensors["unet.model.extra"] = torch.ones(1)
    tensors["lora.up"] = torch.ones(1)
    tensors["unet.model.in_patch.proj.weight"] = torch.ones(32, 16)
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="do not fit") as refusal:
        load(weights, config_path)
    message = str(refusal.value)
    assert "unknown [lora.up, unet.model.extra]" in message
    assert "missing [unet.model.ctx_proj.bias, unet.model.time_emb.freqs]" in message
    assert "misshapen [unet.model.in_patch.proj.weight (32, 16) instead of (32, 4, 2, 2)]" in message


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "it-ran",))

    old, new = tmp_path / "model.ckpt", tmp_path / "model.pt"
    old.write_bytes(pickle.dumps(Bomb()))
    torch.save({"weight": torch.ones(1)}, new)
    for path in (old, new):
        with pytest.raises(ValueError, match="save_file"):
            released.read_tensors(path)
    assert not (tmp_path / "it-ran").exists()


def test_the_command_offered_for_a_pickle_converts_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "my model.ckpt"
    torch.save({"state_dict": {"unet.model.x": torch.arange(4.0)}}, checkpoint)
    with pytest.raises(ValueError, match="python -c") as refusal:
        released.read_tensors(checkpoint)
    command = shlex.split("python -c" + str(refusal.value).split("python -c", 1)[1])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=180)
    converted = released.read_tensors(tmp_path / "my model.ckpt.safetensors")
    assert torch.equal(converted["unet.model.x"], torch.arange(4.0))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"wings": 2}, "wings"),
        ({"shared_adaln": False}, "shared_adaln=False"),
        ({"dim_head": 64}, "dim_head=64"),
        ({"tread_config": {"prev_trns_depth": 1}}, "post_trns_depth"),
    ],
)
def test_another_architecture_is_refused_by_field(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        released.read_config(write_config(tmp_path, **changes))


def test_a_model_of_the_papers_design_is_not_written_as_a_release() -> None:
    config = XUTConfig.tiny()
    with pytest.raises(ValueError, match=r"skip_norm.*rotary"):
        released.to_released(XUT(config).state_dict(), config)
