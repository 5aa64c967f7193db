"""`sample.py --like`: a saved picture, drawn again from its own metadata."""

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

_MADE_WITH = ("checkpoint", "adapters", "device", "precision", "torch")  # keys of PictureModel.made_with


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
        """Prints what will make the new picture differ: checkpoint, adapters, or device, precision and torch."""
        now = model.made_with
        then, here = self.made_with["checkpoint"], now["checkpoint"]
        if then != here:
            step = then.get("step") if isinstance(then, dict) else "unknown"
            print(
                f"sample: {self.path} was drawn with another checkpoint (step {step}; this one: step "
                f"{model.steps_taken}): the picture will differ. --run also takes the path of a checkpoint.",
                flush=True,
            )
        if self.made_with["adapters"] != now.get("adapters"):
            print(
                f"sample: {self.path} was drawn with {_list_adapters(self.made_with['adapters'])}, now with "
                f"{_list_adapters(now.get('adapters'))}: the picture will differ. --lora FOLDER:SCALE sets adapters.",
                flush=True,
            )
        changed = [name for name in ("device", "precision", "torch") if self.made_with[name] != now[name]]
        if changed:
            changes = ", ".join(f"{name} {self.made_with[name]} -> {now[name]}" for name in changed)
            print(f"sample: {self.path} was drawn with {changes}: pixels may differ a little", flush=True)

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


def _list_adapters(adapters: Any) -> str:
    try:
        listed = [f"adapters {each['sha256'][:12]} at {each['scale']}" for each in adapters or []]
    except (KeyError, TypeError):
        return "unknown adapters"
    return " and ".join(listed) or "no adapters"
