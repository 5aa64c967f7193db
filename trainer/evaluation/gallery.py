"""One HTML page about a run: pictures by prompt, seed, shape and camera, measures, the loss, counts of the dataset."""

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from pipeline.core.progress import progress_bar
from pipeline.storage.shards import Store
from trainer.drawing.picture_files import Pixels
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import SamplingSettings
from trainer.evaluation.camera_consistency import CameraConsistency, CameraMove, camera_consistency
from trainer.evaluation.coloured_objects import (
    COLOUR_HUES,
    Agreement,
    ShapeAgreement,
    coloured_object,
    object_agreement,
)
from trainer.evaluation.report import measure_lines
from trainer.samples.data import selection_tags
from trainer.samples.row_index import Selection

_SEEDS_PER_PROMPT = 6
# Sides in multiples of the training resolution. Areas are within an eighth of the square's, as in training.
_SHAPES = {"2:1": (1.5, 0.75), "3:2": (1.25, 0.875), "2:3": (0.875, 1.25), "1:2": (0.75, 1.5)}
_CAMERA: dict[str, list[dict[str, Any]]] = {
    "x-shift": [{"x_shift": -0.25}, {}, {"x_shift": 0.25}],
    "y-shift": [{"y_shift": -0.25}, {}, {"y_shift": 0.25}],
    "zoom": [{"zoom": 0.75}, {}, {"zoom": 1.33}],
}
_CAMERA_PROMPTS = 2  # shown with every camera move
_X_SHIFTS, _ZOOMS = (-0.25, 0.0, 0.25), (0.75, 1.0, 1.33)  # columns and rows of the sweep
_AGREEMENT_SEED = 10_000  # far from the seeds of the page's other pictures


@dataclass(frozen=True)
class Strip:
    """A row of pictures under one title."""

    title: str
    pictures: list[tuple[str, Pixels]]  # label, picture


_Draw = Callable[..., list[Pixels]]  # prompts, seeds and changes of the settings -> pictures
_Measures = tuple[CameraConsistency, Agreement | None, ShapeAgreement | None]


def write_gallery(
    model: PictureModel, prompts: Sequence[str], settings: SamplingSettings, seed: int, out: Path, agreement: int = 0
) -> tuple[Path, int]:
    """Writes OUT/index.html (self-contained), OUT/grid.png and OUT/gallery.json. Returns the page and the number of
    pictures drawn. Raises ValueError if there are no tags of coloured objects for `agreement` pictures to measure."""
    with progress_bar(iter(()), None, "gallery", "pictures") as bar:

        def draw(prompts: Sequence[str], seeds: Sequence[int], **changes: Any) -> list[Pixels]:
            before = bar.n
            changed = replace(settings, **changes)
            return model.draw(prompts, seeds, changed, lambda drawn: bar.update(before + drawn - bar.n))

        camera, camera_strips = _camera(draw, prompts, seed)
        sections = {
            "Prompts and seeds": _prompt_strips(draw, prompts, seed),
            "Wide and tall": [_shape_strip(draw, model, prompt, seed) for prompt in prompts[:3]],
            "Camera": camera_strips,
            "Camera swept over shift and zoom": _sweep_strips(draw, prompts[: _CAMERA_PROMPTS + 1][-1], seed),
        }
        colour, shape = _objects(draw, model, agreement) if agreement else (None, None)
    funnel = _funnel(model.record["selection"]["dataset"], model.record["selection"]["name"])
    out.mkdir(parents=True, exist_ok=True)
    _contact_sheet([strip for strips in sections.values() for strip in strips]).save(out / "grid.png", optimize=True)
    record = {
        "steps": model.steps_taken,
        "colour_agreement": asdict(colour) if colour else None,
        "shape_agreement": asdict(shape) if shape else None,
        "camera": asdict(camera),
        "funnel": funnel,
    }
    (out / "gallery.json").write_text(json.dumps(record, indent=1))
    page = out / "index.html"
    page.write_text(_render(model, sections, (camera, colour, shape), funnel))
    _print_summary((camera, colour, shape), funnel)
    return page.resolve(), bar.n


# --- Pictures ---------------------------------------------------------------------------------------------------------


def _prompt_strips(draw: _Draw, prompts: Sequence[str], seed: int) -> list[Strip]:
    seeds = [seed + number for number in range(_SEEDS_PER_PROMPT)]
    drawn = iter(draw([prompt for prompt in prompts for _ in seeds], seeds * len(prompts)))
    return [Strip(prompt, [(f"seed {number}", next(drawn)) for number in seeds]) for prompt in prompts]


def _shape_strip(draw: _Draw, model: PictureModel, prompt: str, seed: int) -> Strip:
    pictures = []
    for label, sides in _SHAPES.items():
        width, height = (model.nearest_size(model.resolution * side) for side in sides)
        pictures.append((f"{label} ({width} x {height})", draw([prompt], [seed], width=width, height=height)[0]))
    return Strip(prompt, pictures)


def _sweep_strips(draw: _Draw, prompt: str, seed: int) -> list[Strip]:
    """A row for each zoom, a column for each shift."""
    return [
        Strip(
            f"zoom {zoom:g}: {prompt}",
            [(f"x-shift {x:+g}", draw([prompt], [seed], x_shift=x, zoom=zoom)[0]) for x in _X_SHIFTS],
        )
        for zoom in _ZOOMS
    ]


def _camera(draw: _Draw, prompts: Sequence[str], seed: int) -> tuple[CameraConsistency, list[Strip]]:
    """Shifts are drawn for all prompts, because they are measured; zooms only for those that are shown."""
    shown = prompts[:_CAMERA_PROMPTS]
    drawn, moves = {}, list[CameraMove]()
    for move in sorted((move for row in _CAMERA.values() for move in row), key=bool):  # first without a move
        if _name(move) not in drawn:
            of = shown if "zoom" in move else prompts
            drawn[_name(move)] = draw(of, [seed] * len(of), **move)
        if move and "zoom" not in move:
            moves += [CameraMove(*pair, **move) for pair in zip(drawn[_name({})], drawn[_name(move)], strict=True)]
    return camera_consistency(moves), [
        Strip(f"{title}: {prompt}", [(_name(move), drawn[_name(move)][number]) for move in row])
        for number, prompt in enumerate(shown)
        for title, row in _CAMERA.items()
    ]


def _name(move: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:+}" for key, value in move.items()) or "still"


def _objects(draw: _Draw, model: PictureModel, count: int) -> tuple[Agreement, ShapeAgreement | None]:
    """Draws coloured objects that the selection's tags name, and counts right colours and shapes."""
    record = model.record["selection"]
    selection = Selection.load(record["dataset"], record["name"], model.resolution)
    tags = sorted(tag for tag in selection_tags(selection) if tag.split()[0] in COLOUR_HUES)
    if not tags:
        raise ValueError(f"{record['name']!r} has no tags of coloured objects: leave out --colour-agreement")
    # 37 has no factor in common with the number of tags, so that colours and objects are drawn equally often.
    prompts = [tags[number * 37 % len(tags)] for number in range(count)]
    pictures = draw(prompts, [_AGREEMENT_SEED + number for number in range(count)])
    objects = [coloured_object([prompt]) or (prompt.split()[0], None) for prompt in prompts]
    return object_agreement(selection, model.resolution, objects, pictures)


def _contact_sheet(strips: list[Strip]) -> Image.Image:
    """All strips below each other, without text and in 256 colours: small enough for a README."""
    gap = 4  # pixels
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


# --- The page ---------------------------------------------------------------------------------------------------------


def _funnel(dataset: str, selection: str) -> list[dict[str, Any]]:
    """The run records of the dataset's jobs, as far as they exist: what each read, kept and rejected."""
    store = Store(dataset)
    names = ("images/run.json", "captions/run.json", f"selections/{selection}/run.json")
    return [json.loads(store.read(name)) for name in names if store.exists(name)]


def _loss_curve(folder: str) -> str:
    """Points of an SVG polyline in a 600 x 200 box. The loss is averaged over a fiftieth of the stage."""
    store, name = Store(folder), "metrics.jsonl"
    lines = [json.loads(line) for line in store.read(name).splitlines()] if store.exists(name) else []
    lines = [line for line in lines if line["loss"] is not None]  # null: the loss was not finite
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
    model: PictureModel, sections: dict[str, list[Strip]], measures: _Measures, funnel: list[dict[str, Any]]
) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["data_uri"] = _data_uri
    camera, colour, shape = measures
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    return environment.get_template("gallery.html").render(
        sections=sections,
        camera=camera,
        colour=colour,
        shape=shape,
        funnel=funnel,
        steps=model.steps_taken,
        stage=model.record["stage"],
        parameters=f"{parameters / 1e6:.1f}M",
        losses=_loss_curve(model.metrics),
        date=time.strftime("%Y-%m-%d"),
    )


def _print_summary(measures: _Measures, funnel: list[dict[str, Any]]) -> None:
    for record in funnel:
        rejected = ", ".join(f"{count} {reason}" for reason, count in record["rejected"].items()) or "none"
        print(f"  {record['job']}: {record['rows_in']} in, {record['rows_out']} out; rejected: {rejected}")
        for name, why in record.get("failed", {}).items():
            print(f"    not done: {name} ({why})")
    for line in measure_lines(*measures):
        print(f"  {line}")
