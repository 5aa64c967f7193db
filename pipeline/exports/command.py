"""The command line of pipeline/export.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pipeline.core.jobs import Parser, default_dataset, local_path
from pipeline.exports.shards import Format, Text


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    dataset: str
    name: str  # of the selection
    to: Format
    text: Text
    out: Path


def parse_args(description: str | None) -> ExportJob:
    parser = Parser(prog="export.py", description=description)
    parser.add_argument(
        "--dataset", default=default_dataset(), metavar="ROOT",
        help="folder or s3:// prefix of the dataset. Default: $HDM_DATASET, then ./dataset",
    )  # fmt: skip
    parser.add_argument("--name", required=True, metavar="SELECTION", help="the selection to export: see curate.py")
    parser.add_argument(
        "--to", required=True, choices=get_args(Format),
        help="webdataset: a tar a shard, with picture, text and JSON of each row. kohya: folders of pictures with text "
        "files. hf: parquet files for Hugging Face's datasets",
    )  # fmt: skip
    parser.add_argument(
        "--text", choices=get_args(Text), default="full",
        help="tags, the caption, or both as the trainer reads them. Default: full",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; a shared one on a cluster")
    args = parser.parse_args()
    return ExportJob(**vars(args) | {"out": local_path("--out", args.out).absolute()})
