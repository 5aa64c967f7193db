"""The planner's command line."""

from argparse import ArgumentTypeError, Namespace
from functools import partial

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser

MOST_SECONDS = 60.0  # of --measure
_LARGEST = 1e15  # products of larger numbers may overflow


def parse_args(description: str | None) -> Namespace:
    """--set is `settings`; --images and --images-per-second are numbers by stage."""
    parser = Parser(prog="plan.py", description=description)
    add = parser.add_argument
    add("--gpu", metavar="KIND", help='Such as "RTX 4090". Default: RTX 5090, or with --measure the GPU here')
    add("--gpus", type=partial(_number, whole=True), metavar="N", help="Default: 4, or with --measure those here")
    add(
        "--teraflops", type=_number, metavar="F", help="Dense bfloat16 peak of one GPU. Needed if its kind is not known"
    )
    add("--watts", type=_number, metavar="F", help="Board power of one GPU. Needed if its kind is not known")
    add("--price", type=partial(_number, least=0), metavar="DOLLARS",
        help="Price of one GPU hour. Default: what the papers paid, for RTX 5090")  # fmt: skip
    add("--stages", nargs="+", metavar="STAGE", help="Default: 256 512 768 1024, or those --dataset has selections for")
    add("--dataset", metavar="ROOT", help="Use the image counts, file sizes and text lengths of this dataset")
    add("--images", nargs="+", default=[], type=partial(_pair, whole=True), metavar="STAGE=N",
        help="Images per stage. Default: those of --dataset, or the papers'")  # fmt: skip
    add("--images-per-second", nargs="+", default=[], type=_pair, metavar="STAGE=F",
        help="Speed of all GPUs together, for example from the metrics.jsonl of a run")  # fmt: skip
    add("--set", action="append", default=[], dest="settings", metavar="[STAGE.]FIELD=VALUE",
        help="Change a field of every stage, or of one stage, like --set of trainer/run.py")  # fmt: skip
    add("--measure", nargs="?", type=_number, const=MOST_SECONDS, metavar="SECONDS",
        help="Time the training step on this machine, for at most 60 seconds, and plan with its speed")  # fmt: skip
    add("--budget", type=_number, metavar="DOLLARS", help="Shorten the stages until the plan costs no more than this")
    add("--json", metavar="FILE", help="Also write the plan to this file")
    job = parser.parse_args()
    if job.measure is not None and job.measure > MOST_SECONDS:
        raise UsageError(f"--measure {job.measure:g}: at most {MOST_SECONDS:g} seconds")
    job.images, job.images_per_second = dict(job.images), dict(job.images_per_second)
    return job


def _number(text: str, least: float | None = None, whole: bool = False) -> float:
    """A finite number above 0, or not below `least`; an int if `whole`."""
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = float("nan")
    if not (value > 0 if least is None else value >= least) or value > _LARGEST:
        lowest = "above 0" if least is None else f"from {least:g}"
        raise ArgumentTypeError(f"{text} is not a {'whole ' * whole}number {lowest} to {_LARGEST:g}")
    return value


def _pair(text: str, whole: bool = False) -> tuple[str, float]:
    stage, equals, number = text.partition("=")
    if not (stage and equals):
        raise ArgumentTypeError(f"{text}: give a stage and a number, such as 256=1000")
    return stage, _number(number, whole=whole)
