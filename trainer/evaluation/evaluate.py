"""`sample.py --evaluate`: draws pictures of a selection's own texts and measures them.

For a finished checkpoint; `training/validation.py` is what a training run measures of itself.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.core.errors import UsageError
from pipeline.core.progress import progress_bar
from pipeline.storage.shards import Store
from trainer.drawing.draw import fit_to_model, make_batches
from trainer.drawing.picture_files import Pixels, picture_name
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import PictureRequest, SamplingSettings
from trainer.evaluation.camera_consistency import CameraConsistency, CameraMove, camera_consistency
from trainer.evaluation.coloured_objects import Agreement, ShapeAgreement, coloured_object, object_agreement
from trainer.evaluation.fidelity import Fidelity, fidelity
from trainer.evaluation.inception import FEATURES, Inception
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
_GROUP = 32  # pictures in memory at a time


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    dataset: str
    selection: str
    count: int  # pictures, not counting those of the camera moves
    seed: int = 0  # of the first picture
    inception: Path | None = None  # weights for `inception.Inception`
    tagger: Path | None = None  # folder for `tagger.Tagger`

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"--n {self.count}: must be at least 1 picture")
        if self.inception and self.count < 2:
            raise UsageError(f"--n {self.count}: FID needs the covariance of at least 2 pictures")


def evaluate(model: PictureModel, config: EvaluationConfig, settings: SamplingSettings, out: Path) -> Evaluation:
    """Draws what is missing in OUT/pictures, measures all of it and writes OUT/evaluation.json.

    settings: squares of the training resolution. Raises UsageError or ValueError, before anything is drawn, if the
    selection, the tagger or the weights cannot be loaded.
    """
    selection = _load_selection(config, model.resolution)
    tagger = Tagger.load(config.tagger, model.device.type) if config.tagger else None
    inception = Inception.load(config.inception, model.device) if config.inception else None
    rows = evaluation_rows(selection, config.count, model.record["stage"].get("hold_out", 0.0))
    # If more pictures than rows are asked for, texts are repeated with other seeds.
    rows = [rows[number % len(rows)] for number in range(config.count)]
    still = [PictureRequest(prompt=row.text, seed=config.seed + i, settings=settings) for i, row in enumerate(rows)]
    moved = [
        replace(request, settings=replace(settings, **move)) for move in _MOVES for request in still[:_CAMERA_PROMPTS]
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
        "seed": config.seed,
        **drawn_with,
        **asdict(found),
        "notes": notes(found),
    }
    Store(str(out)).write(FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return found


def _load_selection(config: EvaluationConfig, resolution: int) -> Selection:
    try:
        selection = Selection.load(config.dataset, config.selection, resolution)
    except FileNotFoundError as error:
        existing = ", ".join(Store(config.dataset).folders("selections")) or "none"
        raise UsageError(
            f"--evaluate {config.selection}: no such selection in {config.dataset} (there: {existing}). Give one of "
            "these, or another --dataset."
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
    missing = [
        request
        for request, path in zip(requests, paths, strict=True)
        if not (path.exists() and path.with_suffix(".json").exists())
    ]
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
    found = np.concatenate([tagger.found(group) for group in _groups(map(_pixels, paths))])
    return tag_agreement(prompts, tagger.asked(prompts), found)


def _fidelity(
    inception: Inception, selection: Selection, rows: Sequence[EvaluationRow], paths: Sequence[Path], side: int
) -> Fidelity:
    """The drawn pictures against the center crops of the pictures whose texts they were drawn from."""
    real = (pixels for _, pixels in center_crops(selection, rows, side))
    drawn = map(_pixels, paths)
    return fidelity(_features(inception, real, len(rows)), _features(inception, drawn, len(paths)))


def _features(inception: Inception, pictures: Iterable[Pixels], count: int) -> torch.Tensor:
    groups = _groups(progress_bar(pictures, count, "features", "pictures"))
    return torch.cat([torch.empty(0, FEATURES), *(inception.features(group) for group in groups)])


def _groups(pictures: Iterable[Pixels]) -> Iterator[list[Pixels]]:
    remaining = iter(pictures)
    while group := list(islice(remaining, _GROUP)):
        yield group


def _pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
