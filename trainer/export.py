"""JOB: the public HDM weights into this project's model folder, and back into their one-file layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.jobs import JobFailed, Parser, UsageError, local_path, run

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    from_released: str | None
    to_released: str | None
    config: str | None
    out: str


def parse_args() -> ExportJob:
    parser = Parser(prog="export.py", description=__doc__)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from-released", metavar="FILE", help="safetensors with keys unet.model.*, perhaps vae.*")
    direction.add_argument("--to-released", metavar="DIR", help="model folder that --from-released wrote")
    parser.add_argument(
        "--config", metavar="JSON", help="with --from-released: its architecture; default: the public 340M weights"
    )
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="a new folder, or with --to-released a new .safetensors"
    )
    job = ExportJob(**vars(parser.parse_args()))
    if job.config and not job.from_released:
        raise UsageError("--config belongs to --from-released: a model folder has its own config.json")
    return job


def main() -> None:
    job = parse_args()
    out = local_path("--out", job.out)
    for path in filter(None, (job.from_released, job.to_released, job.config)):
        if not Path(path).exists():
            raise UsageError(f"{path} is not there")
    if out.exists():
        raise UsageError(f"{out} is there already; give --out a new path, or remove it first")
    try:
        count = _from_released(job, out) if job.from_released else _to_released(job, out)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"export: {count} tensors written to {out}, read again and found equal", flush=True)


def _from_released(job: ExportJob, out: Path) -> int:
    """The number of tensors written."""
    from trainer.model.released import from_released, read_config, read_tensors  # torch takes seconds: not for --help
    from trainer.model.saved import load_model, save_model
    from trainer.model.xut import XUTConfig

    config = read_config(job.config) if job.config else XUTConfig.released()
    tensors = from_released(read_tensors(str(job.from_released)), config)
    save_model(out, config, tensors)
    _compare(load_model(out)[1], tensors, out)
    return len(tensors)


def _to_released(job: ExportJob, out: Path) -> int:
    from trainer.model.released import read_tensors, to_released, write_released
    from trainer.model.saved import load_model

    config, tensors = load_model(Path(str(job.to_released)))
    released = to_released(tensors, config)
    write_released(out, config, released)
    _compare(read_tensors(out), released, out)
    return len(released)


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
