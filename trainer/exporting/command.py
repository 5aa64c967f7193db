"""Command line of trainer/export.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_run, local_path

Kind = Literal["to_diffusers", "to_released", "to_lora", "from_released"]
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    kind: Kind
    source: str  # a run or a model folder; for from_released a file
    out: Path  # does not exist yet
    weights: Literal["ema", "raw"] | float | None  # a number: averages of this length (trainer/runs/power_ema.py)
    dtype: str | None  # name of a torch dtype
    config: str | None  # JSON file of the architecture; None: that of the public weights


def parse_args(description: str | None) -> ExportJob:
    parser = Parser(prog="export.py", description=description)
    parser.add_argument(
        "--run", metavar="DIR", help="Folder of trainer/run.py, one of its checkpoints, its copy on s3://, or with "
        "--to-released a model folder of --from-released. Default: $HDM_RUN, then ./run"
    )  # fmt: skip
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--to-diffusers", metavar="DIR", help="New folder: a diffusers pipeline with its own code")
    kinds.add_argument("--to-released", metavar="FILE", help="New .safetensors file with keys unet.model.*")
    kinds.add_argument("--to-lora", metavar="DIR", help="New folder for peft: the adapters of a run with --lora")
    kinds.add_argument("--from-released", metavar="FILE", help="Safetensors file with keys unet.model.*, maybe vae.*")
    parser.add_argument("--weights", choices=("ema", "raw"), help="Weights of a run. Default: ema, the averaged ones")
    parser.add_argument(
        "--ema-length", type=float, metavar="L", help="Averages of this length instead, relative to the stage: such as "
        "0.03 or 0.15. Made from the averages that the run has kept"
    )  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="Default: fp32 for a run, unchanged for a model folder")
    parser.add_argument("--out", metavar="DIR", help="With --from-released: the new model folder")
    parser.add_argument(
        "--config", metavar="JSON", help="With --from-released: its architecture. Default: the public 340M"
    )
    args = vars(parser.parse_args())
    if args["ema_length"] is not None and args["weights"]:
        raise UsageError("--ema-length chooses the weights: leave out --weights")
    kind: Kind = next(name for name in get_args(Kind) if args[name])
    target, flag = args[kind], f"--{kind.replace('_', '-')}"
    if kind == "from_released":
        if given := [name for name in ("run", "weights", "ema_length", "dtype") if args[name]]:
            flag = given[0].replace("_", "-")
            raise UsageError(f"--{flag} does not go with --from-released, which keeps the file's tensors unchanged")
        if not args["out"]:
            raise UsageError("--from-released needs --out, a new folder")
        target, flag = args["out"], "--out"
    elif given := [name for name in ("config", "out") if args[name]]:
        raise UsageError(f"--{given[0]} belongs to --from-released; {flag} names what is written, --run the model")
    out = local_path(flag, target)
    for path in filter(None, (args["from_released"], args["config"])):
        if not Path(path).exists():
            raise UsageError(f"{path} does not exist")
    if out.exists():
        raise UsageError(f"{out} exists already. Give {flag} a new path, or remove it first.")
    return ExportJob(
        kind=kind,
        source=args["from_released"] or args["run"] or default_run(),
        out=out,
        weights=args["weights"] if args["ema_length"] is None else args["ema_length"],
        dtype=_DTYPES.get(args["dtype"]),
        config=args["config"],
    )
