"""A run is sampled from wherever it lies."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from pipeline.shards import Store
from trainer.checkpoint import Checkpoints, training_state
from trainer.ema import EMA
from trainer.latents import load_codec
from trainer.model.xut import XUT, XUTConfig
from trainer.pictures import PictureModel, Settings
from trainer.stages import STAGES
from trainer.text import build_local_text_encoder, text_width


def saved_run(run: Path) -> Path:
    """A random model of the demo stage, with its text encoder."""
    stage = STAGES["demo"]
    build_local_text_encoder(["red star", "blue fish"], run / "text_encoder", seed=0)
    config = XUTConfig.tiny(
        in_channels=load_codec(stage.codec).channels, patch_size=1, text_dim=text_width(run / "text_encoder")
    )
    torch.manual_seed(0)
    model = XUT(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # a new model's last layer gives nothing
    state = training_state(
        stage_name="demo",
        epoch=0,
        position=32,
        first_epoch=0,
        seed=0,
        config={"stage": asdict(stage), "model": config.to_dict()},
        selection="abc",
    )
    tensors = {"model": model.state_dict(), "ema": EMA(model, 0.9).state_dict()}
    Checkpoints.of_stage(run, "demo").save(1, tensors, state)
    return run


def test_a_run_on_s3_draws_the_pictures_of_its_local_copy(bucket: str, tmp_path: Path) -> None:
    run = saved_run(tmp_path / "my run")
    remote = Store(f"{bucket}/sampled")
    for name in Store(str(run)).sizes():
        remote.write(name, (run / name).read_bytes())

    def drawn(where: str | Path) -> np.ndarray:
        model = PictureModel.load(where, torch.device("cpu"))
        assert model.steps_taken == 1
        return np.stack(model.draw(["red star"], [3], Settings(width=64, height=64, steps=2)))

    picture = drawn(run)
    assert picture.std() > 0
    np.testing.assert_array_equal(drawn(remote.root), picture)
