"""`sample.py --like`: a saved picture, drawn again from its own metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError
from trainer.drawing.draw import DrawingBatch, make_batches
from trainer.drawing.picture_files import read_metadata
from trainer.drawing.picture_model import MAX_BATCH, PictureModel
from trainer.drawing.prompt_files import Fields, check_fields
from trainer.drawing.settings import PictureRequest

# Keys of PictureModel.made_with -> the effect of a difference.
_MADE_WITH = {
    "checkpoint": "the picture will differ. --run also takes the path of a checkpoint.",
    "adapters": "the picture will differ. --lora FOLDER:SCALE sets adapters.",
    **dict.fromkeys(("device", "precision", "torch"), "pixels may differ a little"),
}


@dataclass(frozen=True)
class SavedPicture:
    path: Path
    fields: Fields
    made_with: Mapping[str, Any]
    batch: Any  # as in `picture_files.save_picture`; None if the picture was drawn alone

    @classmethod
    def read(cls, path: Path) -> "SavedPicture":
        """Raises UsageError if the file is damaged or was not written by sample.py."""
        try:
            metadata = read_metadata(path)
        except ValueError as error:
            raise UsageError(f"--like {error}") from error
        made_with = {name: metadata.pop(name, None) for name in _MADE_WITH}
        batch = metadata.pop("company", None)
        fields = {name: value for name, value in metadata.items() if value is not None}
        return cls(path, check_fields(fields, f"--like {path}"), made_with, batch)

    def print_differences(self, model: PictureModel) -> None:
        """Prints what will make the new picture differ."""
        for name, effect in _MADE_WITH.items():
            then, now = self.made_with[name], model.made_with.get(name)
            if then != now:
                print(f"sample: {self.path} was drawn with {_words(name, then)}, now {_words(name, now)}: {effect}")

    def batches(self, model: PictureModel, request: PictureRequest) -> list[DrawingBatch]:
        """The request in a batch equal to the one it was first drawn in, because the batch size affects rounding.

        Raises UsageError if the metadata about that batch is damaged.
        """
        if self.batch is None:
            return make_batches(model, [request])
        try:
            prompts, seeds, place = (self.batch[name] for name in ("prompts", "seeds", "place"))
            requests = [replace(request, prompt=p, seed=s) for p, s in zip(prompts, seeds, strict=True)]
            valid = len(requests) <= MAX_BATCH and place >= 0 and requests[place] == request
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            valid = False
        if not valid:
            raise UsageError(f"--like {self.path}: its metadata about the batch it was drawn in is damaged")
        return [DrawingBatch(requests, {place: 0})]


def _words(name: str, value: Any) -> str:
    """For example "checkpoint of step 5" or "torch 2.13.0"."""
    if isinstance(value, Mapping) and "step" in value:
        return f"{name} of step {value['step']}"
    return f"{name} {value}" if isinstance(value, str) else f"{name} {json.dumps(value)}" if value else f"no {name}"
