"""A trained model, examined: pictures of a selection's own texts, and what can be counted in them.

`evaluate.py` is what a training asks of itself while it runs; this is for a finished checkpoint.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.core.errors import UsageError
from pipeline.core.progress import progress
from pipeline.storage.shards import Store
from trainer.drawing.draw import batches_of, fitted
from trainer.drawing.pictures import PictureModel, Pixels, Request, Settings, picture_name, save_picture
from trainer.evaluation.agreement import Agreement, colour_agreement
from trainer.evaluation.camera_consistency import Consistency, Move, consistency
from trainer.evaluation.drawn_shapes import Judge, ShapeAgreement, coloured_object
from trainer.evaluation.examined_rows import ExaminedRow, examined_rows, middle_crops
from trainer.evaluation.fidelity import ENOUGH_FOR_FID, Fidelity, fidelity
from trainer.evaluation.inception import FEATURES, Inception
from trainer.evaluation.tagger import TagAgreement, Tagger, tag_agreement
from trainer.samples.data import Selection

FILE = "evaluation.json"
_PICTURES = "pictures"  # folder of OUT

# Of the camera's part: so many of the prompts, each with all of these moves.
_CAMERA_PROMPTS = 16
_MOVES: tuple[dict[str, Any], ...] = ({"x_shift": -0.25}, {"x_shift": 0.25}, {"y_shift": -0.25}, {"y_shift": 0.25})
# Colour and shape are judged where so many of the texts name exactly one coloured object, as the embedded sample's do.
_OF_OBJECTS = 0.9
_JUDGED_BY = 2000  # pictures of the selection whose outlines the judge of shapes knows
_AT_ONCE = 32  # pictures that are held, or go through Inception, together


@dataclass(frozen=True, kw_only=True)
class ExaminationConfig:
    dataset: str
    selection: str
    count: int  # pictures, without those of the camera's part
    seed: int = 0  # of the first picture
    inception: Path | None = None  # weights of `inception.Inception`
    tagger: Path | None = None  # folder of `tagger.Tagger`

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"--n {self.count}: at least 1 picture")
        if self.inception and self.count < 2:
            raise UsageError(f"--n {self.count}: FID compares spreads, which 1 picture does not have; give at least 2")


@dataclass(frozen=True)
class Speed:
    """Of the pictures that were drawn last, on a machine that may have had other work."""

    pictures: int
    pictures_per_second: float
    seconds_per_step: float  # of a batch, decoding shared out
    at_once: int  # pictures, at most


@dataclass(frozen=True)
class Examination:
    pictures: int
    held_out: int  # of them, of texts that were not trained on
    speed: Speed | None  # None where all pictures were there, and no earlier record says how fast they were drawn
    camera: Consistency
    colour: Agreement | None
    shape: ShapeAgreement | None
    tags: TagAgreement | None
    fidelity: Fidelity | None


def examine(model: PictureModel, config: ExaminationConfig, settings: Settings, out: Path) -> Examination:
    """Draws what is not in OUT yet, and writes OUT/evaluation.json. Squares of the training's resolution.

    UsageError, before anything is drawn, for a selection, tagger or weights that are not there.
    """
    selection = _selection(config, model.resolution)
    tagger = Tagger.load(config.tagger, model.device.type) if config.tagger else None
    inception = Inception.load(config.inception, model.device) if config.inception else None
    rows = examined_rows(selection, config.count, model.record["stage"].get("hold_out", 0.0))
    # With more pictures than rows each text comes again, with another seed.
    rows = [rows[number % len(rows)] for number in range(config.count)]
    still = [Request(prompt=row.text, seed=config.seed + i, settings=settings) for i, row in enumerate(rows)]
    moved = [
        replace(request, settings=replace(settings, **move)) for move in _MOVES for request in still[:_CAMERA_PROMPTS]
    ]
    requests = fitted(model, [*still, *moved])
    drawn_with = {"settings": asdict(requests[0].settings), **model.made_with}
    paths, speed = _drawn(model, requests, out / _PICTURES)
    drawn, of_camera = paths[: len(still)], paths[len(still) :]
    found = Examination(
        len(drawn),
        sum(row.held_out for row in rows),
        speed or _speed_before(out, drawn_with),
        _camera(requests[len(still) :], drawn, of_camera),
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


def _speed_before(out: Path, drawn_with: Mapping[str, Any]) -> Speed | None:
    """Of OUT/evaluation.json, where it is about the same model and settings."""
    try:
        record = json.loads(Store(str(out)).read(FILE))
    except (FileNotFoundError, ValueError):
        return None
    same = all(record.get(name) == value for name, value in drawn_with.items())
    return Speed(**record["speed"]) if same and record.get("speed") else None


def table(found: Examination) -> list[str]:
    """What a person reads, a line a figure."""
    lines = [f"pictures: {found.pictures}, {found.held_out} of them of held-out texts"]
    if found.speed:
        lines.append(
            f"speed: {found.speed.pictures_per_second:.3g} pictures/s, {found.speed.seconds_per_step:.3g} s a step of "
            f"up to {found.speed.at_once} pictures"
        )
    else:
        lines.append("speed: not measured, all pictures were there")
    lines += figure_lines(found.camera, found.colour, found.shape)
    if found.tags:
        lines.append(f"tags of the text found: {_share(found.tags.share)} (chance {_share(found.tags.chance)})")
    if found.fidelity:
        lines.append(
            f"FID {found.fidelity.fid:.3f}, KID {found.fidelity.kid:.5f} ± {found.fidelity.kid_spread:.5f}: "
            f"{found.fidelity.drawn} drawn, {found.fidelity.real} of the selection"
        )
    return lines + [f"note: {note}" for note in notes(found)]


def figure_lines(camera: Consistency, colour: Agreement | None, shape: ShapeAgreement | None) -> list[str]:
    lines = [
        f"camera: content moves {camera.ratio:.2f} of the way that it should (median of {camera.moves} shifts), "
        f"{camera.within_40_percent:.0%} within 40%, {camera.right_direction:.0%} in the right direction (chance 50%)"
    ]
    if colour:
        lines.append(_counted("main colour as prompted", colour))
    if shape:
        judge = f"the judge is right on {shape.judge:.0%} of the selection's pictures"
        lines.append(f"{_counted('shape as prompted', shape)}; {judge}")
    return lines


def notes(found: Examination) -> list[str]:
    """What a reader of the figures must know of them."""
    if found.fidelity and (fewest := min(found.fidelity.real, found.fidelity.drawn)) < ENOUGH_FOR_FID:
        return [
            f"FID of {fewest} pictures, less than {ENOUGH_FOR_FID}: its covariance is singular and it comes out far "
            "too high; compare it with FIDs of as many pictures alone, or take KID"
        ]
    return []


def _counted(what: str, found: Agreement | ShapeAgreement) -> str:
    return f"{what}: {found.hits} of {found.total} = {found.share:.0%} (chance {found.chance:.1%})"


def _share(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"


def _selection(config: ExaminationConfig, resolution: int) -> Selection:
    try:
        selection = Selection.load(config.dataset, config.selection, resolution)
    except FileNotFoundError as error:
        there = ", ".join(Store(config.dataset).folders("selections")) or "none"
        raise UsageError(
            f"--evaluate {config.selection}: {config.dataset} has no such selection (there: {there}); give one of "
            "them, or another --dataset"
        ) from error
    if not selection.count:
        raise UsageError(f"--evaluate {config.selection}: the selection has no rows; curate another one")
    return selection


# --- Drawing ----------------------------------------------------------------------------------------------------------


def _drawn(model: PictureModel, requests: Sequence[Request], out: Path) -> tuple[list[Path], Speed | None]:
    """The files of all requests, in their order; those that are whole already, of the same settings and checkpoint,
    are not drawn again."""
    made_with = model.made_with
    paths = [out / f"{picture_name(r.prompt, r.seed, r.settings, made_with)}.png" for r in requests]
    # The JSON is written after the picture, but somebody may have moved pictures away.
    there = [path.exists() and path.with_suffix(".json").exists() for path in paths]
    missing = [request for request, is_there in zip(requests, there, strict=True) if not is_there]
    batches = batches_of(model, missing)
    seconds = 0.0
    with progress(iter(()), len(requests), "evaluate", "pictures") as bar:
        bar.update(len(requests) - len(missing))
        for batch in batches:
            started = time.perf_counter()
            pictures = model.draw(batch.prompts, batch.seeds, batch.settings)
            seconds += time.perf_counter() - started
            for number, place in zip(batch.numbers, batch.places, strict=True):
                wanted = missing[number]
                company = batch.company(place)
                save_picture(out, pictures[place], wanted.prompt, wanted.seed, wanted.settings, made_with, company)
            bar.update(len(batch.numbers))
    if not missing:
        return paths, None
    steps = sum(batch.settings.steps for batch in batches)
    at_once = max(len(batch.prompts) for batch in batches)
    return paths, Speed(len(missing), len(missing) / seconds, seconds / steps, at_once)


def _pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _groups(paths: Sequence[Path]) -> Iterator[list[Pixels]]:
    """All pictures, a few in memory at once."""
    for start in range(0, len(paths), _AT_ONCE):
        yield [_pixels(path) for path in paths[start : start + _AT_ONCE]]


# --- Counting ---------------------------------------------------------------------------------------------------------


def _camera(moved: Sequence[Request], still: Sequence[Path], paths: Sequence[Path]) -> Consistency:
    prompts = len(moved) // len(_MOVES)
    return consistency(
        [
            Move(_pixels(still[i % prompts]), _pixels(path), request.settings.x_shift, request.settings.y_shift)
            for i, (request, path) in enumerate(zip(moved, paths, strict=True))
        ]
    )


def _objects(
    selection: Selection, rows: Sequence[ExaminedRow], paths: Sequence[Path], side: int
) -> tuple[Agreement | None, ShapeAgreement | None]:
    """Main colour and shape; None where most texts do not name one coloured object."""
    named = [coloured_object(row.general) for row in rows]
    asked = [(found, path) for found, path in zip(named, paths, strict=True) if found]
    if len(asked) < _OF_OBJECTS * len(rows):
        return None, None
    pictures = [_pixels(path) for _, path in asked]
    colour = colour_agreement([found[0] for found, _ in asked], pictures)
    judge = judge_of_shapes(selection, side)
    return colour, judge.agreement([found[1] for found, _ in asked], pictures) if judge else None


def judge_of_shapes(selection: Selection, side: int) -> Judge | None:
    """Of the selection's own pictures; None where too few of them show one coloured object."""
    known = [
        (pixels, found[1])
        for row, pixels in middle_crops(selection, examined_rows(selection, _JUDGED_BY, 0.0), side)
        if (found := coloured_object(row.general))
    ]
    try:
        return Judge.of([pixels for pixels, _ in known], [kind for _, kind in known])
    except ValueError:
        return None


def _tags(tagger: Tagger, rows: Sequence[ExaminedRow], paths: Sequence[Path]) -> TagAgreement:
    prompts = [row.text for row in rows]
    return tag_agreement(prompts, tagger.asked(prompts), np.concatenate([tagger.found(g) for g in _groups(paths)]))


def _fidelity(
    inception: Inception, selection: Selection, rows: Sequence[ExaminedRow], paths: Sequence[Path], side: int
) -> Fidelity:
    """The drawn pictures against the middles of the pictures whose texts they were drawn from."""
    real = (pixels for _, pixels in middle_crops(selection, rows, side))
    return fidelity(_features(inception, real, len(rows)), _features(inception, _each(paths), len(paths)))


def _each(paths: Sequence[Path]) -> Iterator[Pixels]:
    for group in _groups(paths):
        yield from group


def _features(inception: Inception, pictures: Iterable[Pixels], count: int) -> torch.Tensor:
    groups, group = [], list[Pixels]()
    for pixels in progress(pictures, count, "features", "pictures"):
        group.append(pixels)
        if len(group) == _AT_ONCE:
            groups.append(inception.features(group))
            group = []
    groups += [inception.features(group)] if group else []
    return torch.cat(groups) if groups else torch.empty(0, FEATURES)
