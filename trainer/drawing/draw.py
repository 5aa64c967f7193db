"""Requests -> batches -> picture files and contact sheets."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.errors import UsageError
from pipeline.core.progress import progress_bar
from pipeline.storage.shards import Store
from trainer.diffusion.sampler import OnStep
from trainer.drawing.picture_files import Pixels, picture_png, save_picture, slug
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.prompt_files import Axis, PictureSpec
from trainer.drawing.settings import PictureRequest, SamplingSettings
from trainer.drawing.sheet import draw_sheet, in_rows, limit_size


def build_request(spec: PictureSpec, side: int) -> PictureRequest:
    """side: default width and height. Raises UsageError, naming file and line, for settings out of range."""
    settings = {"width": side, "height": side, "seed": 0, **spec.fields}
    prompt, seed = settings.pop("prompt"), settings.pop("seed")
    try:
        return PictureRequest(prompt=prompt, seed=seed, settings=SamplingSettings(**settings))
    except ValueError as error:
        raise UsageError(f"{spec.source}: {error}" if spec.source else str(error)) from error


def fit_to_model(model: PictureModel, requests: Sequence[PictureRequest]) -> list[PictureRequest]:
    """The requests with sides rounded to whole tokens, with a notice, and with the time shift filled in. What is not
    read of a prompt that is too long is printed, too."""
    fitted, printed = [], set[str]()
    for request in requests:
        asked, settings = request.settings, model.round_size(request.settings)
        if (settings.width, settings.height) != (asked.width, asked.height):
            sizes = f"{asked.width} x {asked.height} pixels rounded to {settings.width} x {settings.height}"
            if sizes not in printed:
                print(f"sample: {sizes}: sides are multiples of {model.token} pixels", flush=True)
            printed.add(sizes)
        if (unread := model.unread(request)) and unread not in printed:
            print(f"sample: a prompt is longer than {model.text_tokens} tokens; not read: {unread!r}", flush=True)
            printed.add(unread)
        fitted.append(replace(request, settings=replace(settings, shift=model.time_shift(settings))))
    return fitted


@dataclass(frozen=True)
class DrawingBatch:
    """Requests with the same settings, drawn in one batch."""

    requests: list[PictureRequest]
    wanted: dict[int, int]  # place in the batch -> number of the picture; the others are drawn but not saved

    @property
    def settings(self) -> SamplingSettings:
        return self.requests[0].settings

    def draw(self, model: PictureModel, on_step: OnStep | None = None) -> list[Pixels]:
        prompts, seeds = [r.prompt for r in self.requests], [r.seed for r in self.requests]
        return model.draw(prompts, seeds, self.settings, on_step=on_step)

    def save(self, out: Path, pictures: Sequence[Pixels], made_with: Mapping[str, Any]) -> list[Path]:
        """Writes the wanted ones of the batch's pictures into OUT, in the order of `wanted`."""
        batch = {"prompts": [r.prompt for r in self.requests], "seeds": [r.seed for r in self.requests]}
        paths = []
        for place in self.wanted:
            recorded = batch | {"place": place} if len(self.requests) > 1 else None
            paths.append(save_picture(out, pictures[place], self.requests[place], made_with, recorded))
        return paths


def make_batches(model: PictureModel, requests: Sequence[PictureRequest]) -> list[DrawingBatch]:
    """Groups the requests by settings and splits each group into batches that fit into memory."""
    groups: dict[SamplingSettings, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(request.settings, []).append(number)
    batches = []
    for settings, numbers in groups.items():
        size = model.max_batch(settings)
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            batches.append(DrawingBatch([requests[number] for number in some], dict(enumerate(some))))
    return batches


def draw_to_files(model: PictureModel, batches: Sequence[DrawingBatch], out: Path, keep: bool) -> dict[int, Pixels]:
    """Draws and saves batch by batch. Returns number -> picture if `keep`, for a sheet, else {}."""
    kept: dict[int, Pixels] = {}
    made_with = model.made_with
    with progress_bar(
        iter(()), sum(b.settings.steps + b.settings.hires_steps for b in batches), "sample", "steps"
    ) as bar:
        for batch in batches:
            pictures = batch.draw(model, on_step=lambda *_: bar.update())
            for path in batch.save(out, pictures, made_with):
                bar.write(str(path))
            if keep:
                kept |= {number: pictures[place] for place, number in batch.wanted.items()}
    return kept


# --- Sheets ---------------------------------------------------------------------------------------------------------


def write_list(out: Path, requests: Sequence[PictureRequest], pictures: Mapping[int, Pixels]) -> None:
    """Writes OUT/grid-<hash>.png: all pictures, labelled with prompt, seed and the settings in which they differ."""
    all_settings = [asdict(request.settings) for request in requests]
    differing = [name for name in all_settings[0] if any(s[name] != all_settings[0][name] for s in all_settings)]
    labelled = []
    for number, request in enumerate(requests):
        more = [f"{name} {all_settings[number][name]}" for name in differing]
        labelled.append((pictures[number], ", ".join([request.prompt, f"seed {request.seed}", *more])))
    _write_sheet(out, "grid", draw_sheet(in_rows(labelled)), requests)


def write_tables(
    out: Path, requests: Sequence[PictureRequest], pictures: Mapping[int, Pixels], axes: Sequence[Axis]
) -> None:
    """Writes OUT/sweep-<prompt>-<hash>.png for each swept spec: one axis gives a row; of two, the first gives the rows.

    requests: in the order of `prompt_files.sweep`.
    """
    rows, columns = len(axes[0].values) if len(axes) == 2 else 1, len(axes[-1].values)
    for start in range(0, len(requests), rows * columns):
        swept = requests[start : start + rows * columns]
        cells = [[(pictures[start + row * columns + column], "") for column in range(columns)] for row in range(rows)]
        seed = "" if any(axis.field == "seed" for axis in axes) else f", seed {swept[0].seed}"
        title = (swept[0].prompt or "(no prompt)") + seed
        row_labels = axes[0].labels if len(axes) == 2 else ()
        sheet = draw_sheet(cells, title, axes[-1].labels, row_labels)
        _write_sheet(out, f"sweep-{slug(swept[0].prompt)}", sheet, swept)


def _write_sheet(out: Path, name: str, sheet: Image.Image, requests: Sequence[PictureRequest]) -> None:
    """The name gets a hash of the requests, so that no sheet overwrites one of other pictures."""
    metadata = {"pictures": [{"prompt": r.prompt, "seed": r.seed, **asdict(r.settings)} for r in requests]}
    file = f"{name}-{hashlib.sha256(json.dumps(metadata).encode()).hexdigest()[:6]}.png"
    Store(str(out)).write(file, picture_png(np.asarray(limit_size(sheet)), metadata))
    print(out / file, flush=True)
