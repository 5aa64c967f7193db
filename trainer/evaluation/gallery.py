"""One HTML page that shows what a run has learnt: prompts and seeds, wide and tall, camera, figures, loss, counts."""

import base64
import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from pipeline.core.progress import progress
from pipeline.storage.shards import Store
from trainer.drawing.pictures import PictureModel, Pixels, Settings
from trainer.evaluation.agreement import Agreement, colour_agreement, prompted_colour
from trainer.evaluation.camera_consistency import Consistency, Move, consistency
from trainer.evaluation.drawn_shapes import ShapeAgreement, coloured_object
from trainer.evaluation.examination import figure_lines, judge_of_shapes
from trainer.samples.data import Selection, selection_tags

_SEEDS_PER_PROMPT = 6
# Multiples of the training side: the area stays within an eighth of the square's, as the position map expects.
_SHAPES = {"2:1": (1.5, 0.75), "3:2": (1.25, 0.875), "2:3": (0.875, 1.25), "1:2": (0.75, 1.5)}
_CAMERA: dict[str, list[dict[str, Any]]] = {
    "x-shift": [{"x_shift": -0.25}, {}, {"x_shift": 0.25}],
    "y-shift": [{"y_shift": -0.25}, {}, {"y_shift": 0.25}],
    "zoom": [{"zoom": 0.75}, {}, {"zoom": 1.33}],
}
_STRIPS = 2  # prompts that have a strip of each
_X_SHIFTS, _ZOOMS = (-0.25, 0.0, 0.25), (0.75, 1.0, 1.33)  # of the sweep
_SHIFTS = [move for name in ("x-shift", "y-shift") for move in _CAMERA[name] if move]
# Held-out seeds: no picture of the page is drawn from them.
_AGREEMENT_SEED = 10_000


@dataclass(frozen=True)
class Gallery:
    page: Path
    pictures: int  # drawn for it


@dataclass(frozen=True)
class Strip:
    """A row of pictures under one title."""

    title: str
    pictures: list[tuple[str, Pixels]]  # label, picture


def write_gallery(
    model: PictureModel, prompts: Sequence[str], settings: Settings, seed: int, out: Path, agreement_samples: int = 0
) -> Gallery:
    """Draw everything, write OUT/index.html (self-contained), OUT/grid.png and OUT/gallery.json.

    ValueError where the agreement is asked for and the selection names no coloured objects.
    """
    by_move = _moved(model, prompts, settings, seed)
    sections = {
        "Prompts and seeds": _prompt_strips(model, prompts, settings, seed),
        "Wide and tall": _shape_strips(model, prompts[:3], settings, seed),
        "Camera": _camera_strips(by_move, prompts[:_STRIPS]),
        "Camera swept over shift and zoom": _sweep(model, prompts[min(_STRIPS, len(prompts) - 1)], settings, seed),
    }
    figures = _figures(model, settings, agreement_samples, by_move)
    funnel = _funnel(model.record["selection"]["dataset"], model.record["selection"]["name"])
    out.mkdir(parents=True, exist_ok=True)
    drawn = [strip for strips in sections.values() for strip in strips]
    _contact_sheet(drawn).save(out / "grid.png", optimize=True)
    record = {
        "steps": model.steps_taken,
        "colour_agreement": asdict(figures.colour) if figures.colour else None,
        "shape_agreement": asdict(figures.shape) if figures.shape else None,
        "camera": asdict(figures.camera),
        "funnel": funnel,
    }
    (out / "gallery.json").write_text(json.dumps(record, indent=1))
    page = out / "index.html"
    page.write_text(_render(model, sections, figures, funnel))
    _print_summary(figures, funnel)
    in_strips = sum(len(strip.pictures) for title, strips in sections.items() if title != "Camera" for strip in strips)
    return Gallery(page.resolve(), in_strips + sum(map(len, by_move.values())) + agreement_samples)


def _prompt_strips(model: PictureModel, prompts: Sequence[str], settings: Settings, seed: int) -> list[Strip]:
    seeds = [seed + number for number in range(_SEEDS_PER_PROMPT)]
    pairs = [(prompt, number) for prompt in prompts for number in seeds]
    pictures = _draw(model, [p for p, _ in pairs], [s for _, s in pairs], settings, "prompts")
    rows = [pictures[i : i + len(seeds)] for i in range(0, len(pictures), len(seeds))]
    labels = [f"seed {number}" for number in seeds]
    return [Strip(prompt, list(zip(labels, row, strict=True))) for prompt, row in zip(prompts, rows, strict=True)]


def _shape_strips(model: PictureModel, prompts: Sequence[str], settings: Settings, seed: int) -> list[Strip]:
    strips = []
    for prompt in prompts:
        pictures = []
        for label, (wide, tall) in _SHAPES.items():
            width, height = (model.nearest_size(model.resolution * side) for side in (wide, tall))
            [picture] = model.draw([prompt], [seed], replace(settings, width=width, height=height))
            pictures.append((f"{label} ({width} x {height})", picture))
        strips.append(Strip(prompt, pictures))
    return strips


# By how the camera moved: a picture of each prompt or, of moves that only strips show, of the first ones.
_ByMove = dict[str, list[Pixels]]


def _move_name(move: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:+}" for key, value in move.items()) or "still"


def _moved(model: PictureModel, prompts: Sequence[str], settings: Settings, seed: int) -> _ByMove:
    moves = {_move_name(move): move for row in _CAMERA.values() for move in row}
    # The camera's figure is of all prompts.
    drawn_of = {name: prompts if move in ({}, *_SHIFTS) else prompts[:_STRIPS] for name, move in moves.items()}
    pictures = {}
    with progress(iter(()), sum(map(len, drawn_of.values())), "camera", "pictures") as bar:
        for name, move in moves.items():
            of = drawn_of[name]
            pictures[name] = model.draw(of, [seed] * len(of), replace(settings, **move))
            bar.update(len(of))
    return pictures


def _camera_strips(by_move: _ByMove, prompts: Sequence[str]) -> list[Strip]:
    return [
        Strip(f"{name}: {prompt}", [(_move_name(move), by_move[_move_name(move)][number]) for move in moves])
        for number, prompt in enumerate(prompts)
        for name, moves in _CAMERA.items()
    ]


def _sweep(model: PictureModel, prompt: str, settings: Settings, seed: int) -> list[Strip]:
    """A row for each zoom, a column for each shift."""
    rows = []
    for zoom in _ZOOMS:
        drawn = [model.draw([prompt], [seed], replace(settings, x_shift=x, zoom=zoom))[0] for x in _X_SHIFTS]
        labels = [f"x-shift {x:+g}" for x in _X_SHIFTS]
        rows.append(Strip(f"zoom {zoom:g}: {prompt}", list(zip(labels, drawn, strict=True))))
    return rows


@dataclass(frozen=True)
class _Figures:
    camera: Consistency
    colour: Agreement | None  # where it was asked for
    shape: ShapeAgreement | None


def _figures(model: PictureModel, settings: Settings, samples: int, by_move: _ByMove) -> _Figures:
    moves = [
        Move(before, after, move.get("x_shift", 0.0), move.get("y_shift", 0.0))
        for move in _SHIFTS
        for before, after in zip(by_move["still"], by_move[_move_name(move)], strict=True)
    ]
    colour, shape = _agreement(model, settings, samples) if samples else (None, None)
    return _Figures(consistency(moves), colour, shape)


def _agreement(model: PictureModel, settings: Settings, count: int) -> tuple[Agreement, ShapeAgreement | None]:
    """How often the main colour, and the shape, is the prompted one, over the selection's own names of coloured
    objects."""
    record = model.record["selection"]
    selection = Selection.load(record["dataset"], record["name"], model.resolution)
    named = sorted(tag for tag in selection_tags(selection) if prompted_colour(tag) == tag.split()[0])
    if not named:
        raise ValueError(f"the selection {record['name']!r} names no coloured objects: leave --colour-agreement out")
    # A step that shares no factor with the number of names takes the colours and the objects in equal parts.
    prompts = [named[number * 37 % len(named)] for number in range(count)]
    seeds = [_AGREEMENT_SEED + number for number in range(len(prompts))]
    pictures = _draw(model, prompts, seeds, settings, "colour and shape")
    kinds = [found[1] for prompt in prompts if (found := coloured_object([prompt]))]
    judge = judge_of_shapes(selection, model.resolution) if len(kinds) == len(prompts) else None
    return colour_agreement(prompts, pictures), judge.agreement(kinds, pictures) if judge else None


def _draw(model: PictureModel, prompts: list[str], seeds: list[int], settings: Settings, what: str) -> list[Pixels]:
    with progress(iter(()), len(prompts), what, "pictures") as bar:
        return model.draw(prompts, seeds, settings, lambda done: bar.update(done - bar.n))


def _funnel(dataset: str, selection: str) -> list[dict[str, Any]]:
    """What each job of the dataset read, kept and refused: the run records that are there."""
    store = Store(dataset)
    names = ("images/run.json", "captions/run.json", f"selections/{selection}/run.json")
    return [json.loads(store.read(name)) for name in names if store.exists(name)]


def _contact_sheet(strips: list[Strip]) -> Image.Image:
    """All pictures in rows, without text and with 256 colours: small enough for a README or a chat."""
    gap = 4
    rows = [[Image.fromarray(pixels) for _, pixels in strip.pictures] for strip in strips]
    width = max(sum(image.width + gap for image in row) for row in rows) + gap
    height = sum(max(image.height for image in row) + gap for row in rows) + gap
    sheet = Image.new("RGB", (width, height), "white")
    y = gap
    for row in rows:
        x = gap
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width + gap
        y += max(image.height for image in row) + gap
    return sheet.quantize(256)


def _loss_curve(folder: str) -> str:
    """Points of an SVG polyline in a 600 x 200 box; the loss is averaged over a fiftieth of the stage."""
    store, name = Store(folder), "metrics.jsonl"
    lines = [json.loads(line) for line in store.read(name).splitlines()] if store.exists(name) else []
    lines = [line for line in lines if line["loss"] is not None]  # null: it was not finite
    if len(lines) < 2:
        return ""
    window = max(1, len(lines) // 50)
    loss = np.convolve([line["loss"] for line in lines], np.ones(window) / window, mode="valid")
    steps = np.array([line["step"] for line in lines[window - 1 :]])
    x = 600 * (steps - steps[0]) / max(1, steps[-1] - steps[0])
    y = 200 - 200 * loss / loss.max()
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _data_uri(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _render(
    model: PictureModel, sections: dict[str, list[Strip]], figures: _Figures, funnel: list[dict[str, Any]]
) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["data_uri"] = _data_uri
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    return environment.get_template("gallery.html").render(
        sections=sections,
        figures=figures,
        funnel=funnel,
        steps=model.steps_taken,
        stage=model.record["stage"],
        parameters=f"{parameters / 1e6:.1f}M",
        losses=_loss_curve(model.metrics),
        date=time.strftime("%Y-%m-%d"),
    )


def _print_summary(figures: _Figures, funnel: list[dict[str, Any]]) -> None:
    for record in funnel:
        rejected = ", ".join(f"{count} {reason}" for reason, count in record["rejected"].items()) or "none"
        print(f"  {record['job']}: {record['rows_in']} in, {record['rows_out']} out; rejected: {rejected}")
        for name, why in record.get("failed", {}).items():
            print(f"    not done: {name} ({why})")
    for line in figure_lines(figures.camera, figures.colour, figures.shape):
        print(f"  {line}")
