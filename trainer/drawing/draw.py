"""Wishes -> pictures in files: what can be drawn at once, what is written beside it, a picture drawn once more."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.core.progress import progress
from pipeline.storage.shards import Store
from trainer.drawing.pictures import (
    MOST_AT_ONCE,
    PictureModel,
    Pixels,
    Request,
    Settings,
    file_words,
    read_origin,
    save_picture,
)
from trainer.drawing.prompt_files import Axis, Fields, Wish, checked_fields
from trainer.drawing.sheet import Labelled, list_png, table_png

_MADE_WITH = ("checkpoint", "adapters", "device", "precision", "torch")  # PictureModel.made_with


def request_of(wish: Wish, side: int) -> Request:
    """UsageError, which names the line, for settings out of their range. Sides that are not given are `side` long."""
    settings = {"width": side, "height": side, "seed": 0, **wish.fields}
    prompt, seed = settings.pop("prompt"), settings.pop("seed")
    try:
        return Request(prompt=prompt, seed=seed, settings=Settings(**settings))
    except ValueError as error:
        raise UsageError(f"{wish.where}: {error}" if wish.where else str(error)) from error


def fitted(model: PictureModel, requests: Sequence[Request]) -> list[Request]:
    """In sizes that the model can draw, with a notice of those that are not the wanted ones, and with the time shift
    that will be taken."""
    done, told = [], set()
    for request in requests:
        wanted, settings = request.settings, model.fitting(request.settings)
        if (settings.width, settings.height) != (wanted.width, wanted.height):
            sizes = f"{wanted.width} x {wanted.height} pixels rounded to {settings.width} x {settings.height}"
            if sizes not in told:
                print(f"sample: {sizes}: sides are whole tokens of {model.token} pixels", flush=True)
            told.add(sizes)
        done.append(replace(request, settings=replace(settings, shift=model.time_shift(settings))))
    return done


@dataclass(frozen=True)
class Batch:
    """Pictures of equal settings that are drawn at once."""

    prompts: list[str]
    seeds: list[int]
    settings: Settings
    numbers: list[int]  # of the pictures among all that are wanted
    places: list[int]  # theirs in this batch; the others of the batch are company alone

    def company(self, place: int) -> dict[str, Any] | None:
        """See `pictures.save_picture`."""
        return {"prompts": self.prompts, "seeds": self.seeds, "place": place} if len(self.prompts) > 1 else None


def batches_of(model: PictureModel, requests: Sequence[Request]) -> list[Batch]:
    alike: dict[Settings, list[int]] = {}
    for number, request in enumerate(requests):
        alike.setdefault(request.settings, []).append(number)
    batches = []
    for settings, numbers in alike.items():
        size = model.at_once(settings)
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            prompts, seeds = [requests[i].prompt for i in some], [requests[i].seed for i in some]
            batches.append(Batch(prompts, seeds, settings, some, list(range(len(some)))))
    return batches


def draw_to_files(
    model: PictureModel, requests: Sequence[Request], batches: Sequence[Batch], out: Path, keep: bool
) -> dict[int, Pixels]:
    """Each picture is written as soon as its batch is done. With `keep`, all pictures by their numbers, for a sheet."""
    kept: dict[int, Pixels] = {}
    made_with = model.made_with
    with progress(iter(()), sum(batch.settings.steps for batch in batches), "sample", "steps") as bar:
        for batch in batches:
            pictures = model.draw(batch.prompts, batch.seeds, batch.settings, on_step=lambda *_: bar.update())
            for number, place in zip(batch.numbers, batch.places, strict=True):
                wanted, pixels = requests[number], pictures[place]
                company = batch.company(place)
                path = save_picture(out, pixels, wanted.prompt, wanted.seed, wanted.settings, made_with, company)
                bar.write(str(path))
                if keep:
                    kept[number] = pixels
    return kept


# --- Once more ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Original:
    """A picture that is to be drawn again."""

    path: Path
    fields: Fields
    made_with: Mapping[str, Any]
    company: Any  # see `pictures.save_picture`; None where it was drawn alone

    @classmethod
    def read(cls, path: Path) -> "Original":
        """UsageError for a file that no picture of this program, or a damaged one, is in."""
        try:
            origin = read_origin(path)
        except ValueError as error:
            raise UsageError(f"--like {error}") from error
        made_with = {name: origin.pop(name, None) for name in _MADE_WITH}
        company = origin.pop("company", None)
        fields = {name: value for name, value in origin.items() if value is not None}
        return cls(path, checked_fields(fields, f"--like {path}"), made_with, company)

    def tell_of_differences(self, model: PictureModel) -> None:
        """A notice for what will make another picture of it, or other last bits."""
        now = model.made_with
        drawn, found = self.made_with["checkpoint"], now["checkpoint"]
        if drawn != found:
            step = drawn.get("step") if isinstance(drawn, dict) else "unknown"
            print(
                f"sample: {self.path} was drawn with another checkpoint, of step {step}, and this is of step "
                f"{model.steps_taken}: the picture will be another one; --run takes the path of a checkpoint, too",
                flush=True,
            )
        if self.made_with["adapters"] != now.get("adapters"):
            print(
                f"sample: {self.path} was drawn with {_listed(self.made_with['adapters'])}, and this is with "
                f"{_listed(now.get('adapters'))}: the picture will be another one; --lora FOLDER:SCALE gives them",
                flush=True,
            )
        others = [name for name in ("device", "precision", "torch") if self.made_with[name] != now[name]]
        if others:
            changes = ", ".join(f"{name} {self.made_with[name]} -> {now[name]}" for name in others)
            print(f"sample: {self.path} was drawn with {changes}: pixels may differ a little", flush=True)

    def batches(self, model: PictureModel, request: Request) -> list[Batch]:
        """The request in the batch that the picture was drawn in: one of another size would round otherwise.

        UsageError where the file does not tell what batch that was.
        """
        if self.company is None:
            return batches_of(model, [request])
        try:
            prompts, seeds, place = (self.company[name] for name in ("prompts", "seeds", "place"))
            batch = [replace(request, prompt=p, seed=s) for p, s in zip(prompts, seeds, strict=True)]
            right = len(batch) <= MOST_AT_ONCE and place >= 0 and batch[place] == request
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            right = False
        if not right:
            raise UsageError(f"--like {self.path}: its text is damaged where it tells what was drawn beside it")
        return [Batch(prompts, seeds, request.settings, [0], [place])]


def _listed(adapters: Any) -> str:
    """What `PictureModel.made_with` says of them, for a notice."""
    try:
        each = [f"adapters {each['sha256'][:12]} at {each['scale']}" for each in adapters or []]
    except (KeyError, TypeError):
        return "unknown adapters"
    return " and ".join(each) or "no adapters"


# --- Sheets ---------------------------------------------------------------------------------------------------------


def write_list(out: Path, requests: Sequence[Request], pictures: Mapping[int, Pixels]) -> None:
    """OUT/grid-<hash>.png: all pictures, each with its prompt, its seed and what not all of them have in common."""
    all_settings = [asdict(request.settings) for request in requests]
    differing = [name for name in all_settings[0] if any(s[name] != all_settings[0][name] for s in all_settings)]
    labelled = []
    for number, request in enumerate(requests):
        more = [f"{name} {all_settings[number][name]}" for name in differing]
        labelled.append(Labelled(pictures[number], ", ".join([request.prompt, f"seed {request.seed}", *more])))
    _write_sheet(out, "grid", list_png(labelled, _made_by(requests)), requests)


def write_tables(out: Path, requests: Sequence[Request], pictures: Mapping[int, Pixels], axes: Sequence[Axis]) -> None:
    """OUT/sweep-<prompt>-<hash>.png for every wish that was swept: one axis makes a row of pictures, of two the first
    makes the rows. `requests` are in the order of `prompts.swept`."""
    rows, columns = len(axes[0].labels) if len(axes) == 2 else 1, len(axes[-1].labels)
    for start in range(0, len(requests), rows * columns):
        swept = requests[start : start + rows * columns]
        cells = [
            [Labelled(pictures[start + row * columns + column]) for column in range(columns)] for row in range(rows)
        ]
        seed = "" if any(axis.field == "seed" for axis in axes) else f", seed {swept[0].seed}"
        title = (swept[0].prompt or "(no prompt)") + seed
        row_labels = axes[0].labels if len(axes) == 2 else ()
        png = table_png(cells, _made_by(swept), title, axes[-1].labels, row_labels)
        _write_sheet(out, f"sweep-{file_words(swept[0].prompt)}", png, swept)


def _made_by(requests: Sequence[Request]) -> dict[str, Any]:
    return {"pictures": [{"prompt": r.prompt, "seed": r.seed, **asdict(r.settings)} for r in requests]}


def _write_sheet(out: Path, name: str, png: bytes, requests: Sequence[Request]) -> None:
    """Under a name of its own: no sheet overwrites one of other pictures."""
    pictures = hashlib.sha256(json.dumps(_made_by(requests)).encode()).hexdigest()[:6]
    Store(str(out)).write(f"{name}-{pictures}.png", png)
    print(out / f"{name}-{pictures}.png", flush=True)
