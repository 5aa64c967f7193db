"""Converts the page's form to a picture request and back. Knows nothing of gradio."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.drawing.prompt_files import FIELDS
from trainer.drawing.settings import LARGEST_SIDE, PictureRequest, SamplingSettings

# Fields of the form, in the order in which the page sends them. Other FIELDS keep their defaults.
FORM = (
    "prompt", "negative", "width", "height", "steps", "guidance", "sampler", "seed", "x_shift", "y_shift", "zoom",
)  # fmt: skip
_LARGEST_EXACT = 2**53 - 1  # JavaScript's Number.MAX_SAFE_INTEGER
_MAX_TEXT = 4000  # characters; the text encoder reads far fewer
# Camera (x shift, y shift, zoom) of each example in turn.
_CAMERAS = ((0.0, 0.0, 1.0), (0.25, 0.0, 1.0), (0.0, 0.0, 1.4), (-0.25, 0.0, 1.0), (0.0, 0.25, 1.0), (0.0, 0.0, 0.75))
_RATIOS = {"1:1": 1.0, "3:2": 3 / 2, "2:3": 2 / 3, "2:1": 2.0, "1:2": 1 / 2}


@dataclass(frozen=True)
class RequestLimits:
    """Limits of this page, within those of `SamplingSettings`. Raises ValueError for a side above LARGEST_SIDE."""

    largest_side: int  # pixels
    most_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.largest_side <= LARGEST_SIDE:
            raise ValueError(f"--largest-side {self.largest_side}: must be from 1 to {LARGEST_SIDE} pixels")


def read_form(values: Mapping[str, Any], limits: RequestLimits) -> PictureRequest:
    """The requested picture. values: unchecked, as a browser or anything else sent them.

    Raises ValueError, with a message for the visitor, for what cannot be drawn or exceeds the limits.
    """
    fields = {name: _typed(name, values.get(name)) for name in FORM}
    for name in ("prompt", "negative"):
        if len(fields[name]) > _MAX_TEXT:
            raise ValueError(f"the {_label(name)} has {len(fields[name])} characters: {_MAX_TEXT} at most")
    for name in ("width", "height"):
        if fields[name] > limits.largest_side:
            raise ValueError(f"{name} {fields[name]}: this page draws sides of {limits.largest_side} pixels at most")
    if fields["steps"] > limits.most_steps:
        raise ValueError(f"{fields['steps']} steps: this page takes {limits.most_steps} at most")
    prompt, seed = fields.pop("prompt"), fields.pop("seed")
    return PictureRequest(prompt=prompt, seed=seed, settings=SamplingSettings(**fields))


def _typed(name: str, value: Any) -> Any:
    """The value in its type of FIELDS. A browser has one type of number, so 64.0 is accepted as a whole number."""
    wanted = FIELDS[name]
    if wanted is str:
        if value is None or isinstance(value, str):
            return value or ""
        raise ValueError(f"{_label(name)}: must be a text, not {_shown(value)}")
    if value is None or value == "":
        raise ValueError(f"{_label(name)} is empty: give a number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{_label(name)} {_shown(value)}: must be a number")
    if abs(value) >= 2**63:  # may be too large to convert to a float, or to print
        raise ValueError(f"{_label(name)} is out of all bounds")
    if wanted is int:
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"{_label(name)} {value}: must be a whole number")
        if abs(value) > _LARGEST_EXACT:
            raise ValueError(f"{_label(name)}: at most {_LARGEST_EXACT:,}, because browsers round larger numbers")
        return int(value)
    return float(value)


def _label(name: str) -> str:
    return {"negative": "negative prompt"}.get(name, name.replace("_", " "))


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def form_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The form that requests this picture again. metadata: of `read_metadata`."""
    return {name: metadata[name] for name in FORM}


def size_presets(side: int, token: int, largest_side: int) -> dict[str, tuple[int, int]]:
    """Width and height in pixels, by label: whole tokens with about the area of a square of `side` pixels."""
    presets = {}
    for label, ratio in _RATIOS.items():
        width, height = (
            max(1, round(side * math.sqrt(share) / token)) * token for share in (ratio, 1 / ratio)
        )  # fmt: skip
        if max(width, height) <= largest_side:
            presets[f"{label}  {width} × {height}"] = (width, height)
    return presets


def example_rows(prompts: Sequence[str]) -> list[tuple[str, float, float, float]]:
    """Prompt, x shift, y shift and zoom of each example."""
    return [(prompt, *_CAMERAS[number % len(_CAMERAS)]) for number, prompt in enumerate(prompts)]
