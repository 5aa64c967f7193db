"""A trained model -> a folder of diffusers, which brings its own code and needs nothing of this project.

FOLDER/model_index.json                  what is where, text length and size of pictures
FOLDER/pipeline.py                       prompts -> pictures, made from this project's own sources
FOLDER/transformer/                      XUT, config, weights and code
FOLDER/vae/                              a diffusers AutoencoderKL, or of the embedded codecs a matrix and its code
FOLDER/text_encoder/ tokenizer/          of transformers
FOLDER/scheduler/                        a FlowMatchEulerDiscreteScheduler of diffusers
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.errors import JobFailed
from trainer.drawing.picture_model import PictureModel
from trainer.encoders.latents import LinearCodec
from trainer.encoders.pretrained import first_line, quiet
from trainer.encoders.text import TextEncoder
from trainer.encoders.vae import VaeCodec
from trainer.exporting.exported.hdm_codec import HDMCodec
from trainer.exporting.exported.hdm_transformer import HDMTransformer
from trainer.exporting.single_file import single_file

_NOTE = """Made by trainer/export.py of homemade-diffusion (Apache-2.0) from that project's own sources.
Needs torch, diffusers and transformers, and nothing of that project."""


def write_diffusers(folder: Path, picture: PictureModel, dtype: torch.dtype) -> int:
    """The model with its encoders, read again and compared; gives the number of tensors. The folder must not exist yet
    and appears whole.

    dtype: of all weights, but where float16 is asked for the text encoder has bfloat16, because language models trained
    in that overflow, and the matrix of an embedded codec is always float32. JobFailed where what was written does not
    read back as what was meant.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with quiet("diffusers"), quiet("transformers"):
            parts = _save(partial, picture, dtype)
            _compare(partial, parts, picture.encoder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sum(len(part.state_dict()) for part in parts.values())


def _save(folder: Path, picture: PictureModel, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Write everything; gives what has weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, __version__

    transformer = HDMTransformer(picture.model.config.to_dict())
    transformer.xut.load_state_dict(picture.model.state_dict())
    transformer.to(dtype).save_pretrained(folder / "transformer")
    _write_code(folder / "transformer" / "hdm_transformer.py", "trainer.exporting.exported.hdm_transformer")

    vae = _autoencoder(picture.codec, dtype)
    vae.save_pretrained(folder / "vae")
    custom = isinstance(vae, HDMCodec)
    if custom:
        _write_code(folder / "vae" / "hdm_codec.py", "trainer.exporting.exported.hdm_codec")

    text_encoder = picture.encoder.model.to(torch.bfloat16 if dtype == torch.float16 else dtype)
    text_encoder.save_pretrained(folder / "text_encoder")
    picture.encoder.tokenizer.save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    _write_code(folder / "pipeline.py", "trainer.exporting.exported.pipeline")
    index = {
        "_class_name": ["pipeline", "HDMPipeline"],
        "_diffusers_version": __version__,
        "transformer": ["hdm_transformer", "HDMTransformer"],
        "vae": ["hdm_codec" if custom else "diffusers", type(vae).__name__],
        "text_encoder": ["transformers", type(text_encoder).__name__],
        "tokenizer": ["transformers", type(picture.encoder.tokenizer).__name__],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_tokens": picture.text_tokens,
        "resolution": picture.resolution,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}


def _write_code(path: Path, module: str) -> None:
    path.write_text(single_file(module, _NOTE), encoding="utf-8")


def _autoencoder(codec: Any, dtype: torch.dtype) -> Any:
    """The codec as diffusers knows it, with the statistics of its latents in the config."""
    if isinstance(codec, VaeCodec):
        vae, statistics = codec.vae, codec.statistics
        vae.register_to_config(latents_mean=list(statistics.mean), latents_std=list(statistics.std))
        # diffusers would write the folder that it came from, a path of this machine.
        vae.register_to_config(_name_or_path=Path(codec.name).name if Path(codec.name).is_dir() else codec.name)
        return vae.to(dtype)
    assert isinstance(codec, LinearCodec), codec.name
    halvings = codec.factor.bit_length() - 1
    vae = HDMCodec(
        latent_channels=codec.channels,
        block_out_channels=[codec.channels] * (halvings + 1),
        latents_mean=codec.mean_C11.flatten().tolist(),
        latents_std=codec.std_C11.flatten().tolist(),
    )
    vae.load_state_dict({"basis_CP": codec.basis_CP})
    return vae


def _compare(folder: Path, parts: dict[str, nn.Module], encoder: TextEncoder) -> None:
    """Load the folder as its users do, with the code in it. JobFailed where that gives another model."""
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise JobFailed(f"what was written cannot be loaded ({first_line(error)}) and is removed") from error
    text = "1girl, red star: äß 星"
    same = pipe.tokenizer(text)["input_ids"] == encoder.tokenizer(text)["input_ids"]
    for name, part in parts.items():
        same = same and _equal(getattr(pipe, name).state_dict(), part.state_dict())
    if not same:
        raise JobFailed(f"{folder} did not read back as it was written and is removed: look at the disk and run again")


def _equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """In value: diffusers reads half precision as float32 unless told."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].float(), tensor.float()) for name, tensor in wanted.items()
    )
