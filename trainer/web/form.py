"""What the page's form says -> what is to be drawn, or words for why not; and back. Knows nothing of gradio."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.drawing.pictures import LARGEST_SIDE, Request, Settings
from trainer.drawing.prompt_files import FIELDS

# The fields of the form in the order in which the page hands them over. Others of `prompts.FIELDS` keep their defaults.
FORM = (
    "prompt", "negative", "width", "height", "steps", "guidance", "sampler", "seed", "x_shift", "y_shift", "zoom",
)  # fmt: skip
_LONGEST_TEXT = 4000  # characters; the text encoder reads far fewer
# Of the camera: one move for each example in turn.
_MOVES = ((0.0, 0.0, 1.0), (0.25, 0.0, 1.0), (0.0, 0.0, 1.4), (-0.25, 0.0, 1.0), (0.0, 0.25, 1.0), (0.0, 0.0, 0.75))
_RATIOS = {"1:1": 1.0, "3:2": 3 / 2, "2:3": 2 / 3, "2:1": 2.0, "1:2": 1 / 2}


@dataclass(frozen=True)
class Limits:
    """How large a picture this page draws, within those of `pictures.Settings`."""

    largest_side: int  # pixels
    most_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.largest_side <= LARGEST_SIDE:
            raise ValueError(f"--largest-side {self.largest_side}: from 1 to {LARGEST_SIDE} pixels")
        if self.most_steps < 1:
            raise ValueError(f"--most-steps {self.most_steps}: at least 1")


def read_form(values: Mapping[str, Any], limits: Limits) -> Request:
    """The picture that the form asks for; `values` are as a browser, or anything else, sent them.

    ValueError, in words for whoever filled it in, for what cannot be drawn or is too large for this page.
    """
    fields = {name: _typed(name, values.get(name)) for name in FORM}
    for name in ("prompt", "negative"):
        if len(fields[name]) > _LONGEST_TEXT:
            raise ValueError(f"the {_label(name)} has {len(fields[name])} characters: {_LONGEST_TEXT} at most")
    for name in ("width", "height"):
        if fields[name] > limits.largest_side:
            raise ValueError(f"{name} {fields[name]}: this page draws sides of {limits.largest_side} pixels at most")
    if fields["steps"] > limits.most_steps:
        raise ValueError(f"{fields['steps']} steps: this page takes {limits.most_steps} at most")
    prompt, seed = fields.pop("prompt"), fields.pop("seed")
    return Request(prompt=prompt, seed=seed, settings=Settings(**fields))


def _typed(name: str, value: Any) -> Any:
    """In the type of FIELDS: a browser's numbers are all of one type, and 64.0 is a whole one."""
    wanted = FIELDS[name]
    if wanted is str:
        if value is None or isinstance(value, str):
            return value or ""
        raise ValueError(f"{_label(name)}: must be a text, not {_shown(value)}")
    if value is None or value == "":
        raise ValueError(f"{_label(name)} is empty: give a number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{_label(name)} {_shown(value)}: must be a number")
    # A Python int may be too large to become a float, or to be written out; nothing of the form is near.
    if abs(value) >= 2**63:
        raise ValueError(f"{_label(name)} is out of all bounds")
    if wanted is int:
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"{_label(name)} {value}: must be a whole number")
        return int(value)
    return float(value)


def _label(name: str) -> str:
    return {"negative": "negative prompt"}.get(name, name.replace("_", " "))


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def form_of(origin: Mapping[str, Any]) -> dict[str, Any]:
    """The form that asks for this picture again; `origin` as of `pictures.read_origin`."""
    return {name: origin[name] for name in FORM}


# --- What the page offers ---------------------------------------------------------------------------------------------


def size_presets(side: int, token: int, largest_side: int) -> dict[str, tuple[int, int]]:
    """Label -> width and height in pixels, neither above `largest_side`: whole tokens, and about the area of the
    training's squares of that side."""
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
    return [(prompt, *_MOVES[number % len(_MOVES)]) for number, prompt in enumerate(prompts)]
