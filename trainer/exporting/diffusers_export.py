"""Writes a trained model as a diffusers folder that brings its own code and needs nothing of this project.

FOLDER/model_index.json                  components, text length and size of pictures
FOLDER/pipeline.py                       prompts -> pictures, made from this project's own sources
FOLDER/transformer/                      XUT: config, weights and code
FOLDER/vae/                              a diffusers AutoencoderKL; for embedded codecs a matrix and its code
FOLDER/text_encoder/ tokenizer/          of transformers
FOLDER/scheduler/                        a FlowMatchEulerDiscreteScheduler of diffusers
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.errors import JobFailed, UsageError
from trainer.drawing.picture_model import PictureModel
from trainer.encoders.latents import LinearCodec
from trainer.encoders.pretrained import first_line, quiet
from trainer.encoders.text import TextEncoder
from trainer.encoders.vae import VaeCodec
from trainer.exporting.command import ExportJob
from trainer.exporting.exported.hdm_codec import HDMCodec
from trainer.exporting.exported.hdm_transformer import HDMTransformer
from trainer.exporting.single_file import single_file
from trainer.exporting.weight_files import source_checkpoint
from trainer.runs.run_folder import config_of
from trainer.runs.weights import is_model_folder, trained_model

_NOTE = """Made by trainer/export.py of homemade-diffusion (Apache-2.0) from that project's own sources.
Needs torch, diffusers and transformers, and nothing of that project."""


def export_diffusers(job: ExportJob) -> int:
    """Writes the folder and returns its number of tensors. Raises UsageError for a model that cannot be written so."""
    if is_model_folder(Path(job.source)):
        raise UsageError(
            f"{job.source} is only a model, without the codec and the text encoder of a diffusers folder. Give --run a "
            "run of trainer/run.py."
        )
    found = source_checkpoint(job.source)
    if config_of(found)["model"].get("position_grid") == "latent":
        raise UsageError(
            "this model takes a position of every latent pixel, like the public release, but the pipeline gives one of "
            "every token. Export it with --to-released."
        )
    picture = PictureModel.load(found.folder, torch.device("cpu"))
    if job.weights not in (None, "ema"):
        picture.model.load_state_dict(trained_model(found, job.weights).state_dict())
    return write_diffusers(job.out, picture, getattr(torch, job.dtype or "float32"))


def write_diffusers(folder: Path, picture: PictureModel, dtype: torch.dtype) -> int:
    """Writes the model with its encoders and returns the number of tensors. The folder must not exist yet and appears
    whole. Raises JobFailed if it does not read back as it was written.

    dtype: of all weights, except that float16 becomes bfloat16 for the text encoder, because language models trained in
    that overflow, and that the matrix of an embedded codec is always float32.
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
    """Writes all files and returns the modules by their folder."""
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
    """The codec as a diffusers model, with the statistics of its latents in the config."""
    if isinstance(codec, VaeCodec):
        vae, statistics = codec.vae, codec.statistics
        vae.register_to_config(latents_mean=list(statistics.mean), latents_std=list(statistics.std))
        # Otherwise diffusers writes the path of the folder on this machine.
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
    """Loads the folder with its code, as users do. Raises JobFailed if that is another model."""
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise JobFailed(f"what was written cannot be loaded ({first_line(error)}) and was removed") from error
    text = "1girl, red star: äß 星"
    same = pipe.tokenizer(text)["input_ids"] == encoder.tokenizer(text)["input_ids"]
    for name, part in parts.items():
        same = same and _equal(getattr(pipe, name).state_dict(), part.state_dict())
    if not same:
        raise JobFailed(f"{folder} did not read back as it was written and was removed. Check the disk and run again.")


def _equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Compares values, because diffusers reads half precision as float32 unless told otherwise."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].float(), tensor.float()) for name, tensor in wanted.items()
    )
