"""The command line of pipeline/score.py."""

import re
from dataclasses import dataclass

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_dataset, local_path


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    dataset: str
    model: str  # absolute path of the folder
    name: str  # of the scores
    replace: bool  # scores of another model under this name may be replaced
    batch_size: int  # images per forward pass
    actors: int | None  # copies of the model; None: as many as fit
    plan: bool


def parse_args(description: str | None) -> ScoreJob:
    parser = Parser(prog="score.py", description=description)
    parser.add_argument(
        "--dataset", default=default_dataset(), metavar="ROOT",
        help="folder or s3:// prefix of the dataset. Default: $HDM_DATASET, then ./dataset",
    )  # fmt: skip
    parser.add_argument("--model", required=True, metavar="FOLDER", help="config.json + *.safetensors, or model.onnx")
    parser.add_argument(
        "--name",
        help="write scores/<name>/, replacing the scores of any other model there. Default: the folder's name, under "
        "which scores of another model are never replaced",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images per forward pass. Default: 32")
    parser.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="copies of the model. Default: one per GPU or, without GPUs, for three of four CPUs, because the others "
        "decode",
    )
    parser.add_argument("--plan", action="store_true", help="print what would be scored and why, and write nothing")
    args = parser.parse_args()
    folder = local_path("--model", args.model).absolute()
    name = args.name or folder.name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"--name {name!r} must be a folder name of letters, digits, _ . and -")
    if args.batch_size < 1 or (args.actors is not None and args.actors < 1):
        raise UsageError("--batch-size and --actors must be at least 1")
    return ScoreJob(**vars(args) | {"model": str(folder), "name": name, "replace": bool(args.name)})
