"""Times the training step on this machine: the stage's model, codec and text encoder, on synthetic batches."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from timeit import repeat
from typing import Any

import numpy as np
import torch

from pipeline.core.errors import UsageError
from trainer.cost.estimate import Row
from trainer.cost.machines import device_here
from trainer.cost.stage_setup import EMBEDDED_CODECS, EMBEDDED_ENCODER, StageSetup, stage_setup
from trainer.diffusion.keyed_random import sample_key
from trainer.encoders.load_codec import load_codec
from trainer.encoders.pretrained import frozen_dtype
from trainer.encoders.random_encoders import WORDS, local_text_encoder, qwen3_600m, sdxl_vae
from trainer.encoders.text import TextEncoder
from trainer.model.xut import XUT
from trainer.optimization.schedule import Schedule
from trainer.samples.data import Batch
from trainer.training.encoding import encode
from trainer.training.loop_setup import new_loop
from trainer.training.metrics import peak_teraflops

_CPU_STEPS = 4  # a CPU's micro batch is so small that this many steps fit; the recipe's would take minutes
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(setups: Sequence[StageSetup], seconds: float) -> list[Row]:
    """Times steps of each stage, for about `seconds` in total, and leaves out stages that are too large. On a CPU the
    model is tiny unless --set names another. Raises UsageError if no stage could be measured."""
    print(f"plan: timing the training step on {device_here()[0]}, {seconds:g} s", flush=True)
    rate, left, measured = math.inf, seconds, list[Row]()
    for number, setup in enumerate(setups):
        if not torch.cuda.is_available():
            tokens, settings = setup.text_tokens, {"model": "tiny", **setup.settings}
            setup = replace(stage_setup(setup.name, settings, 1), text_tokens=tokens)
            if 4 * setup.total_operations / rate > left:
                continue
        started = time.perf_counter()
        if row := _measure_stage(setup, left / (len(setups) - number)):
            measured.append(row)
            rate = row["images_per_second"] * row["operations"]
            left -= row["seconds"] if torch.cuda.is_available() else time.perf_counter() - started
    if not measured:
        raise UsageError("--measure: one sample does not fit into the GPU's memory; try --set model=tiny")
    return measured


def _measure_stage(setup: StageSetup, seconds: float) -> Row | None:
    """Times steps after a first one, which allocates memory and on a GPU compiles, for minutes. A GPU's micro batch is
    halved until it fits into memory; None if one sample does not fit."""
    on_gpu, samples, begun = torch.cuda.is_available(), setup.micro_batch, time.perf_counter()
    codec, text = _encoders(setup.stage.codec, setup.stage.text_encoder, setup.stage.compiled and on_gpu)
    text = TextEncoder(text.model, text.tokenizer, setup.model.text_layers, setup.model.text_prefix)
    model = replace(setup.model, in_channels=codec.channels, text_dim=text.dim)
    setup, step = replace(setup, model=model, codec_factor=codec.factor), None
    if not on_gpu:
        _, one = repeat(_step(setup, 1, codec, text), repeat=2, number=1)  # the first one allocates memory
        samples = max(1, min(samples, int((seconds - 2 * one) / one / _CPU_STEPS)))
    while samples and not step:
        try:
            step = _step(setup, samples, codec, text)
            step()
        except torch.OutOfMemoryError:
            step, samples = None, samples // 2
    if not step:
        return None
    steps, now = 0, (started := time.perf_counter())
    while not steps or now + (now - started) / steps <= seconds + (started if on_gpu else begun):
        step()
        steps, now = steps + 1, time.perf_counter()
    device, seconds = device_here()[0], now - started
    words = f"model {setup.stage.model}, {setup.stage.resolution} pixels, {setup.text_tokens} text tokens"
    return {
        "stage": setup.name,
        "images_per_second": steps * samples / seconds,
        "steps": steps,
        "micro_batch": samples,
        "seconds": seconds,
        "device": device,
        "peak": peak_teraflops(device),
        "operations": setup.total_operations,
        "remark": f"{words}, random weights and images, on {device}: {steps} steps of {samples} in {seconds:.1f} s",
    }


def _step(setup: StageSetup, size: int, codec: Any, text: TextEncoder) -> Callable[[], None]:
    """A function that takes a step of a new model on `size` images of noise and texts of setup.text_tokens tokens.

    Tokens are not aligned with a vision model (stage.repa), which a training may do for a part of its steps.
    """
    tokens, side = setup.text_tokens, setup.stage.resolution
    stage = replace(setup.stage, micro_batch=size, batch_size=size, text_tokens=tokens, text_multiple=1)
    loop = new_loop(
        stage, XUT(setup.model, setup.checkpointing), Schedule(stage.optimizer, stage.samples), codec, _DEVICE
    )
    batch = Batch(
        ids=[str(i) for i in range(size)],
        pixels_BHW3=np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8),
        frame_B4=np.tile(np.array([0, 0, 1.5 * side, side], np.float32), (size, 1)),
        texts=[WORDS * tokens] * size,
        keys_B=np.array([sample_key(0, 0, i) for i in range(size)], np.int64),
        replaced=[],
    )

    def step() -> None:
        loop.step([encode(batch, codec, text, stage, _DEVICE)])
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step


@lru_cache(maxsize=1)
def _encoders(codec: str, text: str, compiled: bool) -> tuple[Any, TextEncoder]:
    """VAE and language model have the recipe's shape and random weights: they take as long, and need no download."""
    dtype = frozen_dtype(_DEVICE)
    image = load_codec(codec, _DEVICE) if codec in EMBEDDED_CODECS else sdxl_vae(_DEVICE, dtype, compiled)
    return image, local_text_encoder(_DEVICE) if text == EMBEDDED_ENCODER else qwen3_600m(_DEVICE, dtype)
