"""The choice of an attention kernel: which kernels qualify, and what is recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.model import attention
from trainer.model.config import XUTConfig
from trainer.recipe.stages import STAGES
from trainer.training import choose_attention
from trainer.training.choose_attention import choose, measure

CPU = torch.device("cpu")
SHAPE = {"heads": 2, "head_dim": 16, "image_tokens": 16, "text_tokens": 8, "dtype": torch.float32}


def test_only_kernels_that_run_here_qualify() -> None:
    assert measure(CPU, **SHAPE).keys() == {"default"}  # the others need a GPU


def test_a_kernel_that_attends_to_padding_does_not_qualify(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        rows = [x.unflatten(0, (8, -1)).transpose(1, 2) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2).flatten(0, 1)

    monkeypatch.setattr(attention, "varlen_attn", unmasked)
    assert measure(CPU, **SHAPE).keys() == {"default"}


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
