"""Command line of sample.py. Imports no torch, so that --help is fast."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_run, local_path
from trainer.drawing import prompt_files
from trainer.drawing.prompt_files import FIELDS, FLAGS, Axis, Fields, PictureSpec, number_seeds

_SET_BY_EVALUATION = ("width", "height", "x_shift", "y_shift", "zoom")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    selection: str
    n: int = 256  # pictures, not counting those of the camera moves
    dataset: str | None = None  # None: $HDM_DATASET, then the one of the training
    inception: Path | None = None  # weights for FID and KID
    tagger: Path | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"--n {self.n}: must be at least 1 picture")
        if self.inception and self.n < 2:
            raise UsageError(f"--n {self.n}: FID needs the covariance of at least 2 pictures")


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    run: str
    out: Path
    adapters: Sequence[tuple[Path, float]] = ()  # folder and scale
    prompts: Sequence[str] = ()
    prompt_file: str | None = None
    like: str | None = None
    given: Fields  # settings that were given as flags
    sweep: Sequence[Axis] = ()
    grid: bool = False
    gallery: bool = False
    colour_agreement: int = 0  # pictures
    evaluation: EvaluationConfig | None

    def __post_init__(self) -> None:
        for name, least in {"width": 1, "height": 1, "seed": 0}.items():
            if self.given.get(name, least) < least:
                raise UsageError(f"--{name} {self.given[name]}: must be at least {least}")
        if self.colour_agreement < 0:
            raise UsageError(f"--colour-agreement {self.colour_agreement}: must be at least 0 pictures")
        if self.like and self.prompt_file:
            raise UsageError("--like is one picture and --prompts a file of many: give one of the two")
        if self.gallery and (self.like or self.prompt_file or self.grid or self.sweep):
            raise UsageError("--gallery chooses its own pictures: leave out --like, --prompts, --grid and --sweep")
        if self.evaluation:
            if self.prompts or self.prompt_file or self.like or self.grid or self.sweep or self.gallery:
                raise UsageError("--evaluate draws the texts of the selection: leave out the flags for other pictures")
            if fixed := [f"--{name.replace('_', '-')}" for name in _SET_BY_EVALUATION if name in self.given]:
                raise UsageError(f"--evaluate sets the size and the camera itself: leave out {fixed[0]}")
        if len(self.sweep) > 2 or len({axis.name for axis in self.sweep}) < len(self.sweep):
            raise UsageError("--sweep takes one setting, or two different ones for the rows and columns of a sheet")
        for axis in self.sweep:
            if axis.field in self.given and axis.field != "seed":
                raise UsageError(f"--sweep {axis.name} and --{axis.name} contradict each other: leave one out")

    def specs(self, like: Fields | None) -> list[PictureSpec]:
        """The pictures asked for; [] means the example prompts of the run. like: metadata of the picture of --like."""
        if like is not None:
            return number_seeds(self.prompts or [like["prompt"]], {**like, **self.given}, self.like or "")
        if self.prompt_file:
            first = self.given.get("seed", 0)
            lines = prompt_files.read_prompts(local_path("--prompts", self.prompt_file))
            numbered = [{**self.given, "seed": first + i, **line.fields} for i, line in enumerate(lines)]
            return [PictureSpec(fields, line.source) for fields, line in zip(numbered, lines, strict=True)]
        return number_seeds(self.prompts, self.given)


def parse_args(description: str | None) -> SampleJob:
    parser = Parser(prog="sample.py", description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--run", default=default_run(), metavar="DIR",
        help="run, stage or checkpoint folder, local or s3://. Default: $HDM_RUN, then ./run",
    )  # fmt: skip
    parser.add_argument("--out", default="pictures", metavar="DIR", help="output folder. Default: pictures")
    parser.add_argument(
        "--lora", action="append", type=_parse_adapters, dest="adapters", metavar="FOLDER[:SCALE]",
        help="merge LoRA adapters of export.py --to-lora or peft, at a scale (default 1). Repeatable",
    )  # fmt: skip
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", nargs="+", dest="prompts", metavar="TEXT",
        help='prompts; "" is the unconditional one. Default: the example prompts of the run',
    )  # fmt: skip
    prompts.add_argument(
        "--prompts", dest="prompt_file", metavar="FILE",
        help="text file with a prompt per line, or .jsonl with an object per line, whose settings override the flags",
    )  # fmt: skip
    parser.add_argument("--like", metavar="PNG", help="draw a picture of sample.py again; flags change its settings")
    parser.add_argument("--grid", action="store_true", help="also write one labelled sheet of all pictures")
    parser.add_argument(
        "--sweep", action="append", type=prompt_files.parse_axis, metavar="NAME=V,V",
        help="also write a sheet of values of a setting, such as x-shift=-0.25,0,0.25. Given twice: a table",
    )  # fmt: skip
    parser.add_argument("--gallery", action="store_true", help="write OUT/index.html, a page about the run")
    parser.add_argument(
        "--colour-agreement", type=int, metavar="N",
        help="with --gallery: draw N coloured objects of the selection and count right colours and shapes",
    )  # fmt: skip
    _add_evaluation(parser.add_argument_group("evaluation"))
    _add_settings(parser.add_argument_group("settings of a picture"))
    args = vars(parser.parse_args())
    given = {name: args.pop(name) for name in FIELDS if name in args}
    selection = args.pop("evaluate", None)
    flags = {name: args.pop(name) for name in ("n", "dataset", "inception", "tagger") if name in args}
    if flags and selection is None:
        [flag, *_] = flags
        raise UsageError(f"--{flag} is for --evaluate SELECTION: give that, too, or leave --{flag} out")
    evaluation = None if selection is None else EvaluationConfig(selection=selection, **flags)
    out = local_path("--out", args.pop("out"))
    return SampleJob(out=out, given=given, evaluation=evaluation, **args)


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--evaluate", metavar="SELECTION",
        help="draw pictures of the selection's texts and measure them: OUT/evaluation.json. Resumable",
    )  # fmt: skip
    group.add_argument("--n", type=int, metavar="N", help="number of pictures. Default: 256")
    group.add_argument(
        "--dataset", metavar="ROOT",
        help="folder or s3:// prefix of the dataset. Default: $HDM_DATASET, then the dataset of the training",
    )  # fmt: skip
    group.add_argument(
        "--inception", type=Path, metavar="FILE",
        help="Inception weights of FID (2015-12-05) as safetensors: adds FID and KID",
    )  # fmt: skip
    group.add_argument(
        "--tagger", type=Path, metavar="FOLDER", help="tagger model: adds the share of the text's tags that it finds"
    )


_SETTINGS_HELP = {
    "negative": "negative prompt",
    "width": "pixels. Default: side of the training crops",
    "height": "pixels. Default: side of the training crops",
    "x_shift": "move the camera right; 1 is the side of a square",
    "y_shift": "move the camera down",
    "zoom": "above 1: closer",
    "seed": "seed of the first picture, counting up. Default: 0",
    "steps": "sampling steps. Default: 20",
    "sampler": "euler (default), or heun: second order, twice the work per step",
    "guidance": "guidance scale; 1 turns it off. Default: 3",
    "shift": "above 1: more steps near noise. Default: by the number of tokens, 1 at the training resolution",
    "selection_rate": "TREAD: share of tokens that skip the middle blocks, with the prompt. Default: 0",
    "unconditional_rate": "the same with the negative prompt (self-guidance). Default: 0",
    "hires": "enlarge the picture by this factor and finish it at that size. Default: 1, not at all",
    "hires_strength": "how much may change then, from 0.01 to 1. Default: 0.5",
}


def _add_settings(group: argparse._ArgumentGroup) -> None:
    metavars = {str: "TEXT", int: "N", float: "F"}
    for flag, field in FLAGS.items():
        kind = FIELDS[field]
        group.add_argument(f"--{flag}", dest=field, type=kind, metavar=metavars[kind], help=_SETTINGS_HELP[field])


def _parse_adapters(text: str) -> tuple[Path, float]:
    """FOLDER or FOLDER:SCALE, where the folder's name may contain a colon."""
    folder, colon, scale = text.rpartition(":")
    if not colon or local_path("--lora", text).is_dir():
        return Path(text), 1.0
    try:
        number = float(scale)
    except ValueError:
        return Path(text), 1.0
    if not -10 <= number <= 10:  # NaN fails, too
        raise UsageError(f"--lora {text}: give a scale from -10 to 10; 1 is as trained, 0 has no effect")
    return Path(folder), number
