"""`sample.py --evaluate`: draws pictures of a selection's own texts and measures them.

For a finished checkpoint; `training/validation.py` is what a training run measures of itself.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.errors import UsageError
from pipeline.core.jobs import default_dataset
from pipeline.core.progress import progress_bar
from pipeline.storage.shards import Store
from trainer.drawing.command import EvaluationConfig
from trainer.drawing.draw import fit_to_model, make_batches
from trainer.drawing.picture_files import Pixels, picture_name
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import PictureRequest
from trainer.evaluation.camera_consistency import CameraConsistency, CameraMove, camera_consistency
from trainer.evaluation.coloured_objects import Agreement, ShapeAgreement, coloured_object, object_agreement
from trainer.evaluation.fidelity import Fidelity, fidelity
from trainer.evaluation.inception import Inception
from trainer.evaluation.report import Evaluation, SamplingSpeed, notes
from trainer.evaluation.rows import EvaluationRow, center_crops, evaluation_rows
from trainer.evaluation.tagger import TagAgreement, Tagger, tag_agreement
from trainer.samples.row_index import Selection

FILE = "evaluation.json"

# The first 16 prompts are also drawn with each of these camera moves.
_CAMERA_PROMPTS = 16
_MOVES: tuple[dict[str, Any], ...] = ({"x_shift": -0.25}, {"x_shift": 0.25}, {"y_shift": -0.25}, {"y_shift": 0.25})
# Colour and shape are measured if this share of the texts names exactly one coloured object.
_MIN_OBJECTS = 0.9


def evaluate(model: PictureModel, config: EvaluationConfig, first: PictureRequest, out: Path) -> Evaluation:
    """Draws what is missing in OUT/pictures, measures all of it and writes OUT/evaluation.json.

    first: seed of the first picture, and settings: squares of the training resolution. Raises UsageError or ValueError,
    before anything is drawn, if the selection, the tagger or the weights cannot be loaded.
    """
    selection = _load_selection(model, config)
    tagger = Tagger.load(config.tagger, model.device.type) if config.tagger else None
    inception = Inception.load(config.inception, model.device) if config.inception else None
    rows = evaluation_rows(selection, config.n, model.record["stage"].get("hold_out", 0.0))
    # If more pictures than rows are asked for, texts are repeated with other seeds.
    rows = [rows[number % len(rows)] for number in range(config.n)]
    still = [replace(first, prompt=row.text, seed=first.seed + i) for i, row in enumerate(rows)]
    moved = [
        replace(one, settings=replace(first.settings, **move)) for move in _MOVES for one in still[:_CAMERA_PROMPTS]
    ]
    requests = fit_to_model(model, [*still, *moved])
    drawn_with = {"settings": asdict(requests[0].settings), **model.made_with}
    paths, speed = _draw_missing(model, requests, out / "pictures")
    drawn, of_moves = paths[: len(still)], paths[len(still) :]
    found = Evaluation(
        len(drawn),
        sum(row.held_out for row in rows),
        speed or _recorded_speed(out, drawn_with),
        _camera(moved, drawn, of_moves),
        *_objects(selection, rows, drawn, model.resolution),
        _tags(tagger, rows, drawn) if tagger else None,
        _fidelity(inception, selection, rows, drawn, model.resolution) if inception else None,
    )
    record = {
        "selection": {"dataset": selection.dataset, "name": selection.name, "hash": selection.digest},
        "seed": first.seed,
        **drawn_with,
        **asdict(found),
        "notes": notes(found),
    }
    Store(str(out)).write(FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return found


def _load_selection(model: PictureModel, config: EvaluationConfig) -> Selection:
    trained_on = model.record.get("selection", {}).get("dataset")
    dataset = config.dataset or os.environ.get("HDM_DATASET") or trained_on or default_dataset()
    try:
        selection = Selection.load(dataset, config.selection, model.resolution)
    except FileNotFoundError as error:
        existing = ", ".join(Store(dataset).folders("selections")) or "none"
        raise UsageError(
            f"--evaluate {config.selection}: no such selection in {dataset} (there: {existing}). Give one of these, or "
            "another --dataset."
        ) from error
    if not selection.count:
        raise UsageError(f"--evaluate {config.selection}: the selection has no rows; curate another one")
    return selection


# --- Drawing ----------------------------------------------------------------------------------------------------------


def _draw_missing(
    model: PictureModel, requests: Sequence[PictureRequest], out: Path
) -> tuple[list[Path], SamplingSpeed | None]:
    """Paths of all requests in their order. Pictures in OUT with the same settings and checkpoint are kept."""
    made_with = model.made_with
    paths = [out / f"{picture_name(request, made_with)}.png" for request in requests]
    # The JSON is written after the picture, but the user may have moved pictures away.
    exist = [path.exists() and path.with_suffix(".json").exists() for path in paths]
    missing = [request for request, exists in zip(requests, exist, strict=True) if not exists]
    batches = make_batches(model, missing)
    seconds = 0.0
    with progress_bar(iter(()), len(requests), "evaluate", "pictures") as bar:
        bar.update(len(requests) - len(missing))
        for batch in batches:
            started = time.perf_counter()
            pictures = batch.draw(model)
            seconds += time.perf_counter() - started
            bar.update(len(batch.save(out, pictures, made_with)))
    if not missing:
        return paths, None
    steps = sum(batch.settings.steps for batch in batches)
    largest = max(len(batch.requests) for batch in batches)
    return paths, SamplingSpeed(len(missing), len(missing) / seconds, seconds / steps, largest)


def _recorded_speed(out: Path, drawn_with: Mapping[str, Any]) -> SamplingSpeed | None:
    """Speed in an earlier OUT/evaluation.json, if that was of the same model and settings."""
    try:
        record = json.loads(Store(str(out)).read(FILE))
    except (FileNotFoundError, ValueError):
        return None
    same = all(record.get(name) == value for name, value in drawn_with.items())
    return SamplingSpeed(**record["speed"]) if same and record.get("speed") else None


# --- Measuring --------------------------------------------------------------------------------------------------------


def _camera(moved: Sequence[PictureRequest], still: Sequence[Path], paths: Sequence[Path]) -> CameraConsistency:
    prompts = len(moved) // len(_MOVES)
    return camera_consistency(
        [
            CameraMove(_pixels(still[i % prompts]), _pixels(path), request.settings.x_shift, request.settings.y_shift)
            for i, (request, path) in enumerate(zip(moved, paths, strict=True))
        ]
    )


def _objects(
    selection: Selection, rows: Sequence[EvaluationRow], paths: Sequence[Path], side: int
) -> tuple[Agreement | None, ShapeAgreement | None]:
    """Main colour and shape; None if too few texts name exactly one coloured object."""
    named = [(found, path) for row, path in zip(rows, paths, strict=True) if (found := coloured_object(row.general))]
    if len(named) < _MIN_OBJECTS * len(rows):
        return None, None
    return object_agreement(selection, side, [found for found, _ in named], [_pixels(path) for _, path in named])


def _tags(tagger: Tagger, rows: Sequence[EvaluationRow], paths: Sequence[Path]) -> TagAgreement:
    prompts = [row.text for row in rows]
    return tag_agreement(prompts, tagger.asked(prompts), tagger.found(map(_pixels, paths)))


def _fidelity(
    inception: Inception, selection: Selection, rows: Sequence[EvaluationRow], paths: Sequence[Path], side: int
) -> Fidelity:
    """The drawn pictures against the center crops of the pictures whose texts they were drawn from."""
    real = (pixels for _, pixels in center_crops(selection, rows, side))
    real_NC, drawn_NC = (
        inception.features(progress_bar(pictures, len(rows), "features", "pictures"))
        for pictures in (real, map(_pixels, paths))
    )
    return fidelity(real_NC, drawn_NC)


def _pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
