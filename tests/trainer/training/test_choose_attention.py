"""The choice of an attention kernel is recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.model.config import XUTConfig
from trainer.recipe.stages import STAGES
from trainer.training import choose_attention
from trainer.training.choose_attention import choose

CPU = torch.device("cpu")


class Job:
    """What `choose` reads of a training."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stage, self.model, self.codec_factor = str(folder), STAGES["256"], XUTConfig.base(), 8


def test_the_fastest_is_recorded_and_a_resumed_run_takes_it_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measured(*shape: Any) -> dict[str, float]:
        calls.append(shape)
        return {"default": 3.0, "varlen": 1.0, "cudnn": 2.0}

    monkeypatch.setattr(choose_attention, "measure", measured)
    job: Any = Job(tmp_path)
    gpu = torch.device("cuda", 0)
    assert choose(job, gpu, "card") == ("varlen", {"default": 3.0, "varlen": 1.0, "cudnn": 2.0})
    assert choose(job, gpu, "card") == ("varlen", {})
    assert calls == [(gpu, 8, 128, 256, 256)]
    assert json.loads((tmp_path / "attention.json").read_text())["kernel"] == "varlen"
    choose(job, gpu, "another card")
    assert len(calls) == 2
    assert choose(job, CPU, "cpu") == ("default", {})
