"""The command line of pipeline/ingest.py."""

from dataclasses import dataclass
from typing import get_args

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_dataset
from pipeline.ingestion.rules import IngestRules
from pipeline.pictures.decoder import DecodeLimits
from pipeline.sources import ADMISSIBLE, FIELDS, SOURCES
from pipeline.sources.reading import Ratings, ReadingFlags, Separator


@dataclass(frozen=True, kw_only=True)
class IngestJob:
    raw: list[str]  # files, folders or s3:// prefixes
    refresh: list[str]  # likewise, of metadata; empty if raw is not
    source: str  # danbooru | pixiv | auto
    dataset: str
    rows_per_shard: int | None
    plan: bool
    check_ids: bool
    rules: IngestRules


def parse_args(description: str | None) -> IngestJob:
    parser = Parser(prog="ingest.py", description=description)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--raw", nargs="+", default=[], metavar="PATH", help="raw parquet files or folders of them")
    inputs.add_argument(
        "--refresh", nargs="+", default=[], metavar="PATH",
        help="parquet files of metadata, or folders of them: bring favourites, scores, tags, ratings and deletions of "
        "finished images up to date, in posts/; pictures are not touched",
    )  # fmt: skip
    parser.add_argument(
        "--source", choices=(*SOURCES, "auto"), default="auto", help="layout of the files. Default: detected per file"
    )
    parser.add_argument(
        "--dataset", default=default_dataset(), metavar="ROOT",
        help="folder or s3:// prefix of the dataset. Default: $HDM_DATASET, then ./dataset",
    )  # fmt: skip
    parser.add_argument(
        "--map", nargs="+", default=[], metavar="COLUMN=FIELD",
        help="read a raw column as this field of Danbooru's or Pixiv's API",
    )  # fmt: skip
    parser.add_argument(
        "--ratings", choices=get_args(Ratings), default="auto",
        help="what the rating s of Danbooru means: legacy: safe, as before 2022; current: sensitive. Default: legacy "
        "if many samples are s and none is g",
    )  # fmt: skip
    parser.add_argument(
        "--tag-separator", choices=get_args(Separator), default="auto",
        help="what separates tags in text. Default: what most samples of a column have",
    )  # fmt: skip
    reasons = sorted({reason for reasons in ADMISSIBLE.values() for reason in reasons})
    parser.add_argument(
        "--admit", nargs="+", default=[], choices=reasons, metavar="REASON",
        help=f"keep rows that are rejected by default: {', '.join(map(repr, reasons))}",
    )  # fmt: skip
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=100,
        help="reject larger images. Default: 100, which is also the maximum",
    )
    parser.add_argument("--rows-per-shard", type=int, metavar="N", help="split raw files into shards of at most N rows")
    parser.add_argument(
        "--downsize", type=int, metavar="SIDE", help="also write images-SIDE/, with a short side of at most SIDE pixels"
    )
    parser.add_argument(
        "--downsize-format", choices=("JPEG", "WEBP"), default="JPEG", help="of that tier, at quality 92. Default: JPEG"
    )
    parser.add_argument(
        "--check-ids", action="store_true", help="count rows that repeat an id; reads the ids of all new raw files"
    )
    parser.add_argument("--plan", action="store_true", help="print what would be done, and write nothing")
    args = parser.parse_args()
    for flag, value in (("--rows-per-shard", args.rows_per_shard), ("--downsize", args.downsize)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1: got {value}")
    of_pictures = ("rows_per_shard", "downsize", "downsize_format", "max_megapixels", "check_ids")
    given = [f"--{name.replace('_', '-')}" for name in of_pictures if getattr(args, name) != parser.get_default(name)]
    if args.refresh and given:
        raise UsageError(f"--refresh reads no pictures: leave out {', '.join(given)}")
    if not 0 < args.max_megapixels <= 100:  # the trainer has the same limit
        raise UsageError(f"--max-megapixels must be above 0 and at most 100: got {args.max_megapixels:g}")
    rules = IngestRules(
        admit=tuple(sorted(set(args.admit))),
        renamed=tuple(sorted(map(_renamed, args.map))),
        reading=ReadingFlags(ratings=args.ratings, separator=args.tag_separator),
        limits=DecodeLimits(max_pixels=int(args.max_megapixels * 1e6)),
        downsize=args.downsize,
        downsize_format=args.downsize_format,
    )
    return IngestJob(
        raw=args.raw,
        refresh=args.refresh,
        source=args.source,
        dataset=args.dataset,
        rows_per_shard=args.rows_per_shard,
        plan=args.plan,
        check_ids=args.check_ids,
        rules=rules,
    )


def _renamed(pair: str) -> tuple[str, str]:
    column, equals, name = pair.partition("=")
    if not (column and equals) or name not in FIELDS:
        raise UsageError(f"--map {pair} must be COLUMN=FIELD, where FIELD is one of {', '.join(sorted(FIELDS))}")
    return column, name
