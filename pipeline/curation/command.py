"""The command line of pipeline/curate.py: its flags, and the command that repeats the curation of a selection."""

import json
import shlex
from dataclasses import dataclass

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_dataset
from pipeline.curation.quality import PRESETS
from pipeline.curation.stage_rules import RULES
from pipeline.storage.shards import Store

# Flags that decide what a selection contains. curate.py records them in the selection's run.json.
_RECORDED = ("stage", "preset", "rules", "captions")


@dataclass(frozen=True, kw_only=True)
class CurateJob:
    dataset: str
    stage: str
    preset: str | None
    rules: str | None  # path of a TOML file
    name: str  # of the selection
    captions: str | None  # name of a folder in captions/; None: captions/ itself
    new_quality: bool
    plan: bool
    explain: list[str] | None
    diff: list[str] | None

    @property
    def captions_folder(self) -> str:
        return f"captions/{self.captions}" if self.captions else "captions"

    @property
    def recorded(self) -> dict[str, str | None]:
        return {flag: getattr(self, flag) for flag in _RECORDED}


def parse_args(description: str) -> CurateJob:
    """Parses sys.argv. Raises UsageError if a flag is unknown or has a value that it does not take."""
    parser = Parser(prog="curate.py", description=description)
    parser.add_argument(
        "--dataset", default=default_dataset(), metavar="ROOT",
        help="folder or s3:// prefix of the dataset; default: $HDM_DATASET, then ./dataset",
    )  # fmt: skip
    parser.add_argument(
        "--stage", default="demo", choices=tuple(RULES), help="training stage whose rules apply; default: demo"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="quality words; default: the preset of the rules")
    parser.add_argument(
        "--rules", metavar="FILE", help="TOML file that overrides rules; see pipeline/curation/rules/example.toml"
    )
    parser.add_argument("--name", help="name of the selection; default: the name of the stage")
    parser.add_argument(
        "--captions", metavar="NAME", help="use captions/NAME/, written by caption.py --name NAME; default: captions/"
    )
    parser.add_argument(
        "--new-quality", action="store_true",
        help="recompute the quality borders; by default they are kept until the dataset has grown or shrunk by more "
        "than a tenth",
    )  # fmt: skip
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--plan", action="store_true", help="print what would be done and why; write nothing")
    actions.add_argument(
        "--explain", nargs="+", metavar="ID", help="print the result of each rule for these pictures; write nothing"
    )
    actions.add_argument("--diff", nargs=2, metavar=("A", "B"), help="compare the selections A and B; write nothing")
    args = parser.parse_args()
    args.name = args.name or args.stage
    for flag, folder in (("--name", args.name), ("--captions", args.captions or "")):
        if "/" in folder or folder.startswith("."):
            raise UsageError(f"{flag} {folder} must be the name of a folder, without /")
    return CurateJob(**vars(args))


def recorded_flags(store: Store, name: str) -> dict[str, str]:
    """The flags that the last completed curation of this selection was given."""
    file = f"selections/{name}/run.json"
    record = json.loads(store.read(file)) if store.exists(file) else {}
    return {flag: record[flag] for flag in _RECORDED if record.get(flag)}


def curate_command(store: Store, name: str) -> str:
    """The command that repeats the last completed curation of this selection.

    If there is none and the selection is not named after a stage, the command has STAGE for the reader to fill in.
    """
    flags = {"stage": name if name in RULES else "STAGE"} | recorded_flags(store, name)
    if flags["stage"] != name:
        flags["name"] = name
    arguments = [part for flag, value in flags.items() for part in (f"--{flag}", value)]
    return shlex.join(["python", "pipeline/curate.py", "--dataset", store.root, *arguments])
