"""JOB: prompts -> pictures, with a camera; with --gallery, one HTML page that shows what a run has learnt; with
--evaluate, figures of how good its pictures are.
"""

import argparse
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import JobFailed, UsageError
from pipeline.core.jobs import Parser, default_dataset, default_run, local_path, run
from pipeline.storage.run_record import write_run_record
from trainer.drawing.prompt_files import FIELDS, Axis, Fields, Wish, numbered, parse_axis, read_prompts, swept

if TYPE_CHECKING:
    from trainer.drawing.draw import Original
    from trainer.drawing.pictures import PictureModel


_EXAMINED = 256  # pictures of --evaluate
# What --evaluate decides itself.
_OF_EVALUATION = ("width", "height", "x_shift", "y_shift", "zoom")


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    run: str
    out: str
    adapters: list[tuple[Path, float]]  # of --lora: folder and scale
    prompts: list[str]  # of --prompt
    file: str | None  # of --prompts
    like: str | None
    given: Fields  # the settings that have a flag in this command
    sweep: list[Axis]
    grid: bool
    gallery: bool
    colour_agreement: int
    evaluate: str | None  # selection
    n: int | None
    dataset: str | None
    inception: str | None
    tagger: str | None


def parse_args() -> SampleJob:
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument("--run", default=default_run(), metavar="DIR", help="of trainer/run.py, or its copy at s3://")
    parser.add_argument("--out", default="pictures", metavar="DIR", help="default: pictures")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FOLDER[:SCALE]",
        help="merge adapters that export.py --to-lora or peft wrote; scale 1 unless given; repeatable",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help='default: examples kept with the run; "" is allowed')
    what.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line; or .jsonl: an object a line, whose settings go before flags"
    )
    parser.add_argument("--like", metavar="PNG", help="draw this picture of sample.py again; flags change settings")
    parser.add_argument("--grid", action="store_true", help="also one labelled sheet of all pictures")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=V,V",
        help="a sheet of x-shift=-0.25,0,0.25; twice: a table",
    )
    parser.add_argument("--gallery", action="store_true", help="write OUT/index.html")
    parser.add_argument(
        "--colour-agreement", type=int, default=0, metavar="N",
        help="with --gallery: draw N pictures of the selection's coloured objects and count right main colours",
    )  # fmt: skip
    _add_evaluation(parser.add_argument_group("evaluation"))
    _add_settings(parser.add_argument_group("settings of a picture"))
    args = vars(parser.parse_args())
    given = {name: args[name] for name in FIELDS if name != "prompt" and args[name] is not None}
    job = SampleJob(
        run=args["run"],
        out=args["out"],
        adapters=[_adapters(text) for text in args["lora"]],
        prompts=args["prompt"] or [],
        file=args["prompts"],
        like=args["like"],
        given=given,
        sweep=[parse_axis(text) for text in args["sweep"]],
        grid=args["grid"],
        gallery=args["gallery"],
        colour_agreement=args["colour_agreement"],
        evaluate=args["evaluate"],
        n=args["n"],
        dataset=args["dataset"],
        inception=args["inception"],
        tagger=args["tagger"],
    )
    _check(job)
    return job


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--evaluate", metavar="SELECTION",
        help="draw pictures of its texts and count what is in them: OUT/evaluation.json; goes on where it stopped",
    )  # fmt: skip
    group.add_argument("--n", type=int, metavar="N", help="pictures; default: 256")
    group.add_argument("--dataset", metavar="ROOT", help="default: the one that the run was trained on")
    group.add_argument(
        "--inception", metavar="FILE", help="FID's Inception weights (2015-12-05) as safetensors: adds FID and KID"
    )
    group.add_argument("--tagger", metavar="FOLDER", help="adds how many of the text's tags it finds")


def _add_settings(group: argparse._ArgumentGroup) -> None:
    """Without defaults, to tell what was given; they are those of `pictures.Settings`."""
    group.add_argument("--negative", metavar="TEXT", help="what the picture should not be like")
    group.add_argument("--width", type=int, metavar="PIXELS", help="default: the side of the training crops")
    group.add_argument("--height", type=int, metavar="PIXELS")
    group.add_argument("--x-shift", type=float, metavar="F", help="camera right; 1 is the side of a square")
    group.add_argument("--y-shift", type=float, metavar="F", help="camera down")
    group.add_argument("--zoom", type=float, metavar="F", help="above 1 goes closer")
    group.add_argument("--seed", type=int, metavar="N", help="of the first picture; the next have N+1 ...; default: 0")
    group.add_argument("--steps", type=int, metavar="N", help="of the sampler; default: 20")
    group.add_argument(
        "--sampler", metavar="NAME", help="euler (default), or heun: second order, twice the work a step"
    )
    group.add_argument("--guidance", type=float, metavar="F", help="1 is off; default: 3")
    group.add_argument(
        "--time-shift", type=float, metavar="F", dest="shift",
        help="above 1: more of the steps near noise; default: by the picture's tokens, 1 at the training's size",
    )  # fmt: skip
    group.add_argument(
        "--selection-rate", type=float, metavar="F",
        help="TREAD: share of tokens that skip the middle blocks with the prompt; default: 0, none",
    )  # fmt: skip
    group.add_argument(
        "--unconditional-rate", type=float, metavar="F", help="the same with the negative prompt (self-guidance)"
    )


def _adapters(text: str) -> tuple[Path, float]:
    """FOLDER or FOLDER:SCALE; a folder may have a colon in its name."""
    folder, colon, scale = text.rpartition(":")
    if not colon or local_path("--lora", text).is_dir():
        return Path(text), 1.0
    try:
        number = float(scale)
    except ValueError:
        return Path(text), 1.0
    if not -10 <= number <= 10:  # so that NaN is refused, too
        raise UsageError(f"--lora {text}: a scale from -10 to 10; 1 is as they were trained, 0 leaves them out")
    return Path(folder), number


def _check(job: SampleJob) -> None:
    for name in ("width", "height"):
        if job.given.get(name, 1) < 1:
            raise UsageError(f"--{name} {job.given[name]}: a picture has at least 1 pixel")
    if job.given.get("seed", 0) < 0:
        raise UsageError(f"--seed {job.given['seed']}: at least 0")
    if job.colour_agreement < 0:
        raise UsageError(f"--colour-agreement {job.colour_agreement}: a number of pictures, 0 for none")
    if job.like and job.file:
        raise UsageError("--like is one picture and --prompts a file of many: give one of the two")
    if job.gallery and (job.like or job.file or job.grid or job.sweep):
        raise UsageError("--gallery draws a page of its own: leave out --like, --prompts, --grid and --sweep")
    if job.evaluate is None:
        for flag in ("n", "dataset", "inception", "tagger"):
            if getattr(job, flag) is not None:
                raise UsageError(f"--{flag} is for --evaluate SELECTION: give that too, or leave --{flag} out")
    elif job.prompts or job.file or job.like or job.grid or job.sweep or job.gallery:
        raise UsageError("--evaluate draws the selection's own texts: leave out what else to draw")
    elif fixed := [f"--{name.replace('_', '-')}" for name in _OF_EVALUATION if name in job.given]:
        raise UsageError(f"--evaluate draws squares of the training's size and moves the camera: leave out {fixed[0]}")
    if len(job.sweep) > 2 or len({axis.name for axis in job.sweep}) < len(job.sweep):
        raise UsageError("--sweep: one setting, or two different ones, for the rows and the columns of a sheet")
    for axis in job.sweep:
        if axis.field in job.given and axis.field != "seed":
            raise UsageError(f"--sweep {axis.name} and --{axis.name} both say what it is: leave one out")


def main() -> None:
    job = parse_args()
    started = time.time()
    out = local_path("--out", job.out)
    import torch  # takes seconds: not for --help

    from trainer.drawing.draw import Original, request_of
    from trainer.drawing.pictures import PictureModel

    original = Original.read(Path(job.like)) if job.like else None
    wishes = _wishes(job, original)
    for wish in wishes or numbered([""], job.given):  # before a model is loaded, which can take minutes
        for variant in swept(wish, job.sweep):
            request_of(variant, side=1)
    try:
        model = PictureModel.load(job.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        for folder, scale in job.adapters:
            model = model.with_adapters(folder, scale)
        if job.evaluate is not None:
            _evaluate(job, job.evaluate, model, out, started)
            return
        wishes = wishes or numbered(model.record["example_prompts"], job.given)
        if job.gallery:
            _draw_gallery(job, model, wishes, out, started)
        else:
            _draw_pictures(job, model, wishes, original, out, started)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise JobFailed("the GPU has not enough memory for these pictures: ask for smaller ones") from error


def _wishes(job: SampleJob, original: "Original | None") -> list[Wish]:
    """Every picture's settings as far as they are known without the model; none for the run's own examples."""
    if original:
        prompts = job.prompts or [original.fields["prompt"]]
        return numbered(prompts, {**original.fields, **job.given}, job.like or "")
    if job.file:
        first = job.given.get("seed", 0)
        lines = read_prompts(local_path("--prompts", job.file))
        return [Wish({**job.given, "seed": first + i, **line.fields}, line.where) for i, line in enumerate(lines)]
    return numbered(job.prompts, job.given)


def _draw_pictures(
    job: SampleJob, model: "PictureModel", wishes: list[Wish], original: "Original | None", out: Path, started: float
) -> None:
    from trainer.drawing.draw import batches_of, draw_to_files, fitted, request_of, write_list, write_tables
    from trainer.drawing.sheet import MOST_ON_A_SHEET

    variants = [variant for wish in wishes for variant in swept(wish, job.sweep)]
    requests = fitted(model, [request_of(variant, model.resolution) for variant in variants])
    on_a_sheet = max(len(requests) if job.grid else 0, len(requests) // len(wishes) if job.sweep else 0)
    if on_a_sheet > MOST_ON_A_SHEET:
        raise UsageError(
            f"{on_a_sheet} pictures on a sheet: {MOST_ON_A_SHEET} at most; leave out --grid, or sweep less"
        )
    batches = batches_of(model, requests)
    if original:
        original.tell_of_differences(model)
        if not (job.given or job.prompts or job.sweep):
            batches = original.batches(model, requests[0])
    pictures = draw_to_files(model, requests, batches, out, keep=job.grid or bool(job.sweep))
    if job.sweep:
        write_tables(out, requests, pictures, job.sweep)
    if job.grid:
        write_list(out, requests, pictures)
    count = len(requests)
    write_run_record(str(out), "sample", started, count, count, {}, settings=dict(job.given), **model.made_with)


def _draw_gallery(job: SampleJob, model: "PictureModel", wishes: list[Wish], out: Path, started: float) -> None:
    from trainer.drawing.draw import request_of
    from trainer.evaluation.gallery import write_gallery

    first = request_of(wishes[0], model.resolution)
    settings = model.fitting(first.settings)
    prompts = [str(wish.fields["prompt"]) for wish in wishes]
    gallery = write_gallery(model, prompts, settings, first.seed, out, job.colour_agreement)
    write_run_record(str(out), "sample", started, gallery.pictures, gallery.pictures, {}, settings=asdict(settings))
    print(f"sample: {gallery.page}", flush=True)


def _evaluate(job: SampleJob, selection: str, model: "PictureModel", out: Path, started: float) -> None:
    from trainer.drawing.draw import request_of
    from trainer.evaluation.examination import ExaminationConfig, examine, table

    first = request_of(numbered([""], job.given)[0], model.resolution)
    trained_on = model.record.get("selection", {}).get("dataset", default_dataset())
    config = ExaminationConfig(
        dataset=job.dataset or os.environ.get("HDM_DATASET") or trained_on,
        selection=selection,
        count=_EXAMINED if job.n is None else job.n,
        seed=first.seed,
        inception=Path(job.inception) if job.inception else None,
        tagger=Path(job.tagger) if job.tagger else None,
    )
    found = examine(model, config, first.settings, out)
    for line in table(found):
        print(f"  {line}", flush=True)
    write_run_record(str(out), "sample", started, found.pictures, found.pictures, {}, settings=dict(job.given))
    print(f"sample: {out / 'evaluation.json'}", flush=True)


if __name__ == "__main__":
    run(main)
