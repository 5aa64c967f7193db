"""JOB: a trained model -> a diffusers folder, one file as the public HDM weights have it, or a folder of adapters; and
the public weights into this project's model folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.core.errors import JobFailed, UsageError
from pipeline.core.jobs import Parser, default_run, local_path, run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.runs.checkpoint import Checkpoint

Weights = Literal["ema", "raw"]  # of trainer.runs.weights, which imports torch
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    run: str | None
    to_diffusers: str | None
    to_released: str | None
    to_lora: str | None
    from_released: str | None
    weights: Weights | None
    dtype: str | None
    config: str | None
    out: str | None


def parse_args() -> ExportJob:
    parser = Parser(prog="export.py", description=__doc__)
    parser.add_argument(
        "--run", metavar="DIR", help="of trainer/run.py, one of its checkpoints, its copy at s3://, or with "
        "--to-released also a model folder that --from-released wrote"
    )  # fmt: skip
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to-diffusers", metavar="DIR", help="a new folder: a diffusers pipeline with its own code")
    direction.add_argument("--to-released", metavar="FILE", help="a new .safetensors with keys unet.model.*")
    direction.add_argument("--to-lora", metavar="DIR", help="a new folder: the adapters of a run with --lora, for peft")
    direction.add_argument("--from-released", metavar="FILE", help="safetensors with keys unet.model.*, perhaps vae.*")
    parser.add_argument("--weights", choices=("ema", "raw"), help="of a run; default: ema, the averaged ones")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="of a run default: fp32; of a model folder: as it is")
    parser.add_argument("--out", metavar="DIR", help="with --from-released: a new model folder")
    parser.add_argument(
        "--config", metavar="JSON", help="with --from-released: its architecture; default: the public 340M weights"
    )
    job = ExportJob(**vars(parser.parse_args()))
    if job.from_released:
        if given := [name for name in ("run", "weights", "dtype") if getattr(job, name)]:
            raise UsageError(
                f"--{given[0]} does not go with --from-released, which keeps the file's tensors as they are"
            )
        if not job.out:
            raise UsageError("--from-released needs --out, a new folder")
    elif given := [name for name in ("config", "out") if getattr(job, name)]:
        raise UsageError(
            f"--{given[0]} belongs to --from-released; --to-diffusers, --to-released and --to-lora name what they "
            "write, and --run names the model"
        )
    return job


def main() -> None:
    job = parse_args()
    flag, new = next(
        (flag, path)
        for flag, path in (
            ("--out", job.out),
            ("--to-diffusers", job.to_diffusers),
            ("--to-released", job.to_released),
            ("--to-lora", job.to_lora),
        )
        if path
    )
    out = local_path(flag, new)
    for path in filter(None, (job.from_released, job.config)):
        if not Path(path).exists():
            raise UsageError(f"{path} is not there")
    if out.exists():
        raise UsageError(f"{out} is there already; give {flag} a new path, or remove it first")
    try:
        if job.from_released:
            count = _from_released(job, out)
        else:
            count = (_to_diffusers if job.to_diffusers else _to_lora if job.to_lora else _to_released)(job, out)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"export: {count} tensors written to {out}, read again and found equal", flush=True)


def _from_released(job: ExportJob, out: Path) -> int:
    """The number of tensors written."""
    from trainer.model.released import from_released, read_config, read_tensors  # torch takes seconds: not for --help
    from trainer.model.xut import XUTConfig
    from trainer.runs.model_folder import load_model, save_model

    config = read_config(job.config) if job.config else XUTConfig.released()
    tensors = from_released(read_tensors(str(job.from_released)), config)
    save_model(out, config, tensors)
    _compare(load_model(out)[1], tensors, out)
    return len(tensors)


def _to_released(job: ExportJob, out: Path) -> int:
    from trainer.model.released import read_tensors, to_released, write_released
    from trainer.runs.model_folder import is_model_folder, load_model
    from trainer.runs.weights import trained_model

    source = job.run or default_run()
    if is_model_folder(Path(source)):
        if job.weights:
            raise UsageError(f"--weights belongs to a run; {source} is a model folder, which has one set of weights")
        config, tensors = load_model(Path(source))
    else:
        model = trained_model(_checkpoint(source), job.weights or "ema")
        config, tensors = model.config, model.state_dict()
    if job.dtype:
        tensors = _converted(tensors, _dtype(job.dtype))
    released = to_released(tensors, config)
    write_released(out, config, released)
    _compare(read_tensors(out), released, out)
    return len(released)


def _to_diffusers(job: ExportJob, out: Path) -> int:
    from trainer.runs.model_folder import is_model_folder
    from trainer.runs.run_folder import config_of

    source = job.run or default_run()
    if is_model_folder(Path(source)):
        raise UsageError(
            f"{source} is a model alone, without the codec and the text encoder that a diffusers folder has; "
            "--to-diffusers needs a run of trainer/run.py"
        )
    found = _checkpoint(source)
    if config_of(found)["model"].get("position_grid") == "latent":
        raise UsageError(
            "this model takes a position of every latent pixel, as the public release does, and the pipeline gives one "
            "of every token: export it with --to-released"
        )
    import torch

    from trainer.drawing.pictures import PictureModel
    from trainer.exporting.diffusers_export import write_diffusers
    from trainer.runs.weights import trained_model

    picture = PictureModel.load(found.folder, torch.device("cpu"))
    if job.weights == "raw":
        picture.model.load_state_dict(trained_model(found, "raw").state_dict())
    return write_diffusers(out, picture, _dtype(job.dtype or "fp32"))


def _to_lora(job: ExportJob, out: Path) -> int:
    from trainer.runs.lora import read_adapters, write_adapters
    from trainer.runs.model_folder import is_model_folder
    from trainer.runs.run_folder import config_of
    from trainer.runs.weights import Lora, adapters

    source = job.run or default_run()
    found = None if is_model_folder(Path(source)) else _checkpoint(source)
    lora = Lora.of(config_of(found)) if found else None
    if found is None or lora is None:
        raise UsageError(
            f"{source} has no adapters: it was not trained with --lora; --to-diffusers and --to-released take whole "
            "models"
        )
    tensors = adapters(found, job.weights or "ema")
    if job.dtype:
        tensors = _converted(tensors, _dtype(job.dtype))
    exported = write_adapters(out, tensors, lora.rank)
    _compare(read_adapters(out)[1], exported, out)
    return len(exported)


def _checkpoint(source: str) -> "Checkpoint":
    """The newest one of a run, a stage or the checkpoint itself."""
    from pipeline.storage.shards import Store
    from trainer.runs.run_folder import find_checkpoint

    root = Store(source).root
    found = find_checkpoint(root)
    if found is None:
        raise UsageError(f"{root} has no checkpoint and is no model folder; give --run a run of trainer/run.py")
    return found


def _dtype(name: str) -> "torch.dtype":
    import torch

    dtype = getattr(torch, _DTYPES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _converted(tensors: dict[str, "Tensor"], dtype: "torch.dtype") -> dict[str, "Tensor"]:
    """But for the frequencies of the time: rounded to half precision they turn it by a quarter of a radian."""
    return {name: tensor if name == "time_in.frequency" else tensor.to(dtype) for name, tensor in tensors.items()}


def _compare(found: dict[str, "Tensor"], wanted: dict[str, "Tensor"], out: Path) -> None:
    """JobFailed where what was written is not what was meant: a full or a failing disk."""
    same = found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and _bytes(found[name]) == _bytes(tensor) for name, tensor in wanted.items()
    )
    if not same:
        raise JobFailed(f"{out} does not read back as it was written: remove it, look at the disk and run again")


def _bytes(tensor: "Tensor") -> bytes:
    """To be compared instead of numbers, of which NaN does not equal itself."""
    import torch

    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


if __name__ == "__main__":
    run(main)
