"""Times the training step on the machine at hand: the stage's model, codec and text encoder, on synthetic batches."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from trainer.cost.costs import EMBEDDED_CODECS, EMBEDDED_ENCODER, Measured, Setting
from trainer.diffusion.keyed_random import sample_key
from trainer.encoders.latents import Codec
from trainer.encoders.load_codec import load_codec
from trainer.encoders.pretrained import folder_at_hand, frozen_dtype
from trainer.encoders.random_encoders import WORDS, local_text_encoder, qwen3_600m, sdxl_vae
from trainer.encoders.text import TextEncoder, load_text_encoder
from trainer.model.xut import XUT
from trainer.samples.data import Batch
from trainer.training.metrics import peak_teraflops
from trainer.training.worker import encode, new_loop

# On a CPU a micro batch of the recipe would take minutes: of a smaller one so many steps are to fit in a probe.
_CPU_STEPS = 4
# Of a matrix product's speed, before anything was measured: what a step reaches on a CPU (tests/bench/RESULTS.md: 85%),
# on the careful side.
_EXPECTED_SHARE = 0.4


@dataclass(frozen=True)
class Encoders:
    codec: Codec
    text: TextEncoder
    remark: str


def device_at_hand() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU of {torch.get_num_threads()} threads"


def measure(settings: Sequence[Setting], seconds: float, device: torch.device) -> tuple[list[Measured], list[str]]:
    """Steps of each setting for an equal share of `seconds` in all, and what could not be measured, a line each.

    Each begins with a step that does not count: it allocates, and compiles where the stage is compiled, which takes
    minutes of its own. On a CPU two steps of one sample come first, of which the second says how many samples a step
    may have; a setting of which four such steps would, by arithmetic, take longer than what is left is left out.
    """
    measured: list[Measured] = []
    remarks: list[str] = []
    rate = _EXPECTED_SHARE * _matmul_rate(device)
    left, encoders = seconds, dict[tuple[str, ...], Encoders]()
    for number, setting in enumerate(settings):
        stage = setting.stage
        key = (stage.codec, stage.text_encoder, setting.model.text_layers)
        if key not in encoders:
            encoders = {key: _encoders(setting, device)}
        share = left / (len(settings) - number)
        setting = _as_probed(setting, encoders[key])
        if device.type == "cpu":
            expected = 4 * setting.work.total / rate
            if expected > left:
                remarks.append(
                    f"stage {setting.name} is not measured: by arithmetic its probe takes {expected:.0f} s here"
                )
                continue
            step = _stepping(_with_micro_batch(setting, 1), encoders[key], device)
            spent, seconds_of_one = _seconds(step), _seconds(step)
            left, share = (max(0.0, seconds - spent - seconds_of_one) for seconds in (left, share))
            fitting = int(share / seconds_of_one / _CPU_STEPS)
            setting = _with_micro_batch(setting, min(setting.stage.micro_batch, max(1, fitting)))
        found, spent, remark = _probe_what_fits(setting, encoders[key], share, device)
        remarks += [remark] if remark else []
        if found:
            measured.append(found)
            rate = found.operations_per_second
            left = max(0.0, left - spent)
    return measured, remarks


def _probe_what_fits(
    setting: Setting, encoders: Encoders, seconds: float, device: torch.device
) -> tuple[Measured | None, float, str]:
    """`_probe` with the largest halving of the micro batch that fits into the GPU's memory; and a remark on that."""
    size = whole = setting.stage.micro_batch
    while size:
        try:
            found, spent = _probe(_with_micro_batch(setting, size), encoders, seconds, device)
        except torch.OutOfMemoryError:
            size //= 2
        else:
            smaller = f"stage {setting.name}: micro batch {size} instead of {whole}, for the GPU's memory"
            return found, spent, smaller if size < whole else ""
        torch.cuda.empty_cache()  # after the exception is gone, which holds the model
    return None, 0.0, f"stage {setting.name} is not measured: one sample does not fit into the GPU"


def _probe(setting: Setting, encoders: Encoders, seconds: float, device: torch.device) -> tuple[Measured, float]:
    """Also the seconds that it took out of the time for training steps."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    step = _stepping(setting, encoders, device)
    seconds_of_first = _seconds(step)
    spent = 0.0 if on_gpu and setting.stage.compiled else seconds_of_first
    steps, now = 0, (started := time.perf_counter())
    # Another step only where it will be done in time; one in any case.
    while not steps or spent + (now - started) * (steps + 1) / steps <= seconds:
        step()
        steps, now = steps + 1, time.perf_counter()
    name = device_name(device)
    return Measured(
        setting=setting,
        device=name,
        peak_teraflops=peak_teraflops(name),
        encoders=encoders.remark,
        steps=steps,
        seconds=now - started,
        memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
    ), spent + now - started


def _stepping(setting: Setting, encoders: Encoders, device: torch.device) -> Callable[[], None]:
    """One whole step of a new model, each time that it is called."""
    stage = replace(setting.stage, text_tokens=setting.text_tokens, text_multiple=1)
    model = XUT(setting.model, stage.checkpointing)
    loop = new_loop(stage, model, stage.samples // stage.batch_size, encoders.codec, device)
    batch = _batch(setting)

    def step() -> None:
        loop.step([encode(batch, encoders.codec, encoders.text, stage, device)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _as_probed(setting: Setting, encoders: Encoders) -> Setting:
    """With the widths of the encoders; an optimizer step is one micro batch."""
    codec = encoders.codec
    model = replace(setting.model, in_channels=codec.channels, text_dim=encoders.text.dim)
    setting = replace(setting, model=model, codec_factor=codec.factor)
    return _with_micro_batch(setting, setting.stage.micro_batch)


def _with_micro_batch(setting: Setting, samples: int) -> Setting:
    stage = replace(setting.stage, micro_batch=samples, batch_size=samples, samples=max(samples, setting.stage.samples))
    return replace(setting, stage=stage)


def _batch(setting: Setting) -> Batch:
    """Noise for pictures, and texts of at least setting.text_tokens tokens."""
    stage = setting.stage
    size, side = stage.micro_batch, stage.resolution
    random = np.random.default_rng(0)
    return Batch(
        ids=[str(i) for i in range(size)],
        pixels_BHW3=random.integers(0, 256, (size, side, side, 3), np.uint8),
        frame_B4=np.tile(np.array([0, 0, 1.5 * side, side], np.float32), (size, 1)),
        texts=[WORDS * setting.text_tokens] * size,
        keys_B=np.array([sample_key(0, 0, i) for i in range(size)], np.int64),
        replaced=[],
    )


def _encoders(setting: Setting, device: torch.device) -> Encoders:
    codec, image = _codec(setting.stage.codec, setting.stage.compiled, device)
    encoder, text = _text_encoder(setting.stage.text_encoder, device)
    encoder.layers = setting.model.text_layers
    return Encoders(codec, encoder, f"{image}, {text}")


def _codec(name: str, compiled: bool, device: torch.device) -> tuple[Codec, str]:
    """Itself where it is on this machine; else a random one of the recipe's shape, which takes as long."""
    compiled = compiled and device.type == "cuda"
    if name in EMBEDDED_CODECS:
        return load_codec(name, device), f"codec {name}"
    if folder := _at_hand(name):
        return load_codec(str(folder), device, compiled=compiled), f"codec {name}"
    stand_in = sdxl_vae(device, frozen_dtype(device), compiled)
    return stand_in, f"SDXL's VAE with random weights for {name}, which is not on this machine"


def _text_encoder(name: str, device: torch.device) -> tuple[TextEncoder, str]:
    """The same of the text encoder."""
    if name == EMBEDDED_ENCODER:
        return local_text_encoder(device), f"text encoder {name}"
    if folder := _at_hand(name):
        return load_text_encoder(folder, device), f"text encoder {name}"
    stand_in = qwen3_600m(device, frozen_dtype(device))
    return stand_in, f"Qwen3-0.6B with random weights for {name}, which is not on this machine"


def _at_hand(name: str) -> Path | None:
    """A folder with weights."""
    folder = folder_at_hand(name)
    return folder if folder and any(folder.rglob("*.safetensors")) else None


def _matmul_rate(device: torch.device) -> float:
    """Operations a second of a large square product in fp32."""
    side = 1024
    a = torch.randn(side, side, device=device)
    torch.mm(a, a)
    started = time.perf_counter()
    for _ in range(4):
        torch.mm(a, a)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 4 * 2 * side**3 / (time.perf_counter() - started)
