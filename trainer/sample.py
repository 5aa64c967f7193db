"""JOB: prompts -> pictures, with a camera; or, with --gallery, one HTML page that shows what a run has learnt."""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pipeline.jobs import Parser, UsageError, default_run, local_path, progress, run, write_run_record

if TYPE_CHECKING:
    from trainer.pictures import PictureModel


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    run: str
    prompt: list[str]
    out: str
    negative: str
    width: int | None
    height: int | None
    x_shift: float
    y_shift: float
    zoom: float
    seed: int
    steps: int
    guidance: float
    gallery: bool
    colour_agreement: int


def parse_args() -> SampleJob:
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument("--run", default=default_run(), metavar="DIR", help="of trainer/run.py, or its copy at s3://")
    parser.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="default: examples kept with the run")
    parser.add_argument("--out", default="pictures", metavar="DIR", help="default: pictures")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what the picture should not be like")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="default: the side of the training crops")
    parser.add_argument("--height", type=int, metavar="PIXELS")
    parser.add_argument(
        "--x-shift", type=float, default=0.0, metavar="F", help="camera right; 1 is the side of a square"
    )
    parser.add_argument("--y-shift", type=float, default=0.0, metavar="F", help="camera down")
    parser.add_argument("--zoom", type=float, default=1.0, metavar="F", help="above 1 goes closer")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture; the next have N+1 ...")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of the sampler; default: 20")
    parser.add_argument("--guidance", type=float, default=3.0, metavar="F", help="1 is off; default: 3")
    parser.add_argument("--gallery", action="store_true", help="write OUT/index.html")
    parser.add_argument(
        "--colour-agreement", type=int, default=0, metavar="N",
        help="with --gallery: draw N pictures of the selection's coloured objects and count right main colours",
    )  # fmt: skip
    job = SampleJob(**vars(parser.parse_args()))
    if not 0 <= job.seed < 2**62:
        raise UsageError(f"--seed {job.seed}: from 0 to {2**62 - 1}")
    if job.colour_agreement < 0:
        raise UsageError(f"--colour-agreement {job.colour_agreement}: a number of pictures, 0 for none")
    return job


def main() -> None:
    job = parse_args()
    started = time.time()
    import torch  # takes seconds: not for --help

    from trainer.gallery import write_gallery
    from trainer.pictures import PictureModel, Settings, save_picture

    out = local_path("--out", job.out)
    try:
        model = PictureModel.load(job.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        settings = Settings(
            width=_whole_tokens(model, "width", job.width),
            height=_whole_tokens(model, "height", job.height),
            negative=job.negative,
            steps=job.steps,
            guidance=job.guidance,
            x_shift=job.x_shift,
            y_shift=job.y_shift,
            zoom=job.zoom,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    prompts = job.prompt or model.record["example_prompts"]
    seeds = [job.seed + number for number in range(len(prompts))]
    if job.gallery:
        try:
            gallery = write_gallery(model, prompts, settings, job.seed, out, job.colour_agreement)
        except ValueError as error:
            raise UsageError(str(error)) from error
        write_run_record(str(out), "sample", started, gallery.pictures, gallery.pictures, {}, settings=asdict(settings))
        print(f"sample: {gallery.page}", flush=True)
        return
    with progress(iter(()), len(prompts), "sample", "pictures") as bar:
        pictures = model.draw(prompts, seeds, settings, lambda done: bar.update(done - bar.n))
    for prompt, seed, pixels in zip(prompts, seeds, pictures, strict=True):
        print(save_picture(out, pixels, prompt, seed, settings), flush=True)
    write_run_record(str(out), "sample", started, len(prompts), len(pictures), {}, settings=asdict(settings))


def _whole_tokens(model: "PictureModel", name: str, pixels: int | None) -> int:
    """The side asked for, or the nearest one that the model can draw, with a notice."""
    if pixels is None:
        return model.resolution
    if pixels < 1:
        raise ValueError(f"--{name} {pixels}: a picture has at least 1 pixel")
    nearest = model.nearest_size(pixels)
    if nearest != pixels:
        print(f"sample: {name} {pixels} rounded to {nearest}: sides are whole tokens", flush=True)
    return nearest


if __name__ == "__main__":
    run(main)
