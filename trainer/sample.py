"""JOB: prompts -> pictures, with a movable camera. With --gallery: an HTML page that shows what a run has learned. With
--evaluate: measures of picture quality.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import JobFailed, UsageError
from pipeline.core.jobs import run
from pipeline.storage.run_record import write_run_record
from trainer.drawing.command import EvaluationConfig, SampleJob, parse_args
from trainer.drawing.prompt_files import PictureSpec, number_seeds, sweep

if TYPE_CHECKING:
    from trainer.drawing.picture_model import PictureModel
    from trainer.drawing.redraw import SavedPicture


def main() -> None:
    job = parse_args(__doc__)
    started = time.time()
    import torch  # takes seconds, which --help should not

    from trainer.drawing.draw import build_request
    from trainer.drawing.picture_model import PictureModel
    from trainer.drawing.redraw import SavedPicture

    saved = SavedPicture.read(Path(job.like)) if job.like else None
    specs = job.specs(saved.fields if saved else None)
    for spec in specs or number_seeds([""], job.given):  # refuse bad settings before a model is loaded
        for variant in sweep(spec, job.sweep):
            build_request(variant, side=1)
    try:
        model = PictureModel.load(job.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        for folder, scale in job.adapters:
            model = model.with_adapters(folder, scale)
        if job.evaluation:
            _evaluate(job, job.evaluation, model, started)
            return
        specs = specs or number_seeds(model.record["example_prompts"], job.given)
        if job.gallery:
            _draw_gallery(job, model, specs, started)
        else:
            _draw_pictures(job, model, specs, saved, started)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise JobFailed("the GPU does not have enough memory for these pictures: ask for smaller ones") from error


def _draw_pictures(
    job: SampleJob, model: "PictureModel", specs: list[PictureSpec], saved: "SavedPicture | None", start: float
) -> None:
    from trainer.drawing.draw import build_request, draw_to_files, fit_to_model, make_batches, write_list, write_tables
    from trainer.drawing.sheet import MOST_ON_A_SHEET

    variants = [variant for spec in specs for variant in sweep(spec, job.sweep)]
    requests = fit_to_model(model, [build_request(variant, model.resolution) for variant in variants])
    on_a_sheet = max(len(requests) if job.grid else 0, len(requests) // len(specs) if job.sweep else 0)
    if on_a_sheet > MOST_ON_A_SHEET:
        raise UsageError(
            f"{on_a_sheet} pictures on one sheet: the limit is {MOST_ON_A_SHEET}. Leave out --grid, or sweep less."
        )
    batches = make_batches(model, requests)
    if saved:
        saved.print_differences(model)
        if not (job.given or job.prompts or job.sweep):
            batches = saved.batches(model, requests[0])
    pictures = draw_to_files(model, batches, job.out, keep=job.grid or bool(job.sweep))
    if job.sweep:
        write_tables(job.out, requests, pictures, job.sweep)
    if job.grid:
        write_list(job.out, requests, pictures)
    count = len(requests)
    write_run_record(str(job.out), "sample", start, count, count, {}, settings=dict(job.given), **model.made_with)


def _draw_gallery(job: SampleJob, model: "PictureModel", specs: list[PictureSpec], start: float) -> None:
    from trainer.drawing.draw import build_request
    from trainer.evaluation.gallery import write_gallery

    first = build_request(specs[0], model.resolution)
    settings = model.round_size(first.settings)
    prompts = [str(spec.fields["prompt"]) for spec in specs]
    page, count = write_gallery(model, prompts, settings, first.seed, job.out, job.colour_agreement)
    write_run_record(str(job.out), "sample", start, count, count, {}, settings=asdict(settings))
    print(f"sample: {page}", flush=True)


def _evaluate(job: SampleJob, config: EvaluationConfig, model: "PictureModel", start: float) -> None:
    from trainer.drawing.draw import build_request
    from trainer.evaluation.evaluate import evaluate
    from trainer.evaluation.report import report_lines

    first = build_request(number_seeds([""], job.given)[0], model.resolution)
    found = evaluate(model, config, first, job.out)
    for line in report_lines(found):
        print(f"  {line}", flush=True)
    write_run_record(str(job.out), "sample", start, found.pictures, found.pictures, {}, settings=dict(job.given))
    print(f"sample: {job.out / 'evaluation.json'}", flush=True)


if __name__ == "__main__":
    run(main)
