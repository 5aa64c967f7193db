from pathlib import Path

import pytest
import torch

from trainer.drawing.picture_model import PictureModel


@pytest.fixture(scope="session")
def model(random_run: Path) -> PictureModel:
    return PictureModel.load(random_run, torch.device("cpu"))
