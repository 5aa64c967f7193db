"""What the user asks for: prompt files, settings as plain fields, and the axes of a sweep.

Knows names and types of the settings, not their ranges: `settings.SamplingSettings` checks those. Imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.core.text_files import read_text

# Fields of a line in a .jsonl prompt file and of a picture's metadata.
FIELDS: dict[str, type] = {
    **dict.fromkeys(("prompt", "negative"), str),
    **dict.fromkeys(("width", "height"), int),
    **dict.fromkeys(("x_shift", "y_shift", "zoom"), float),
    **dict.fromkeys(("seed", "steps"), int),
    "sampler": str,
    **dict.fromkeys(("guidance", "shift", "selection_rate", "unconditional_rate", "hires", "hires_strength"), float),
}
_TYPE_NAMES = {str: "a text in quotes", int: "a whole number", float: "a number"}
# Flag without dashes -> field. "shift" alone would be taken for the camera's.
FLAGS = {("time-shift" if name == "shift" else name.replace("_", "-")): name for name in FIELDS if name != "prompt"}

Fields = Mapping[str, Any]  # some of FIELDS; missing ones have defaults


@dataclass(frozen=True)
class PictureSpec:
    """A picture as the user asked for it."""

    fields: Fields
    source: str = ""  # file and line, for error messages


@dataclass(frozen=True)
class Axis:
    """One setting and its values in a sweep."""

    name: str  # flag without dashes
    values: Sequence[Any]

    @property
    def field(self) -> str:
        return FLAGS[self.name]

    @property
    def labels(self) -> list[str]:
        return [
            f"{self.name} {value:g}" if isinstance(value, float) else f"{self.name} {value}" for value in self.values
        ]


def read_prompts(path: Path) -> list[PictureSpec]:
    """Reads a text file with a prompt per line, or a .jsonl file with an object of FIELDS per line.

    Empty lines are skipped. Raises UsageError, naming the line, if a line cannot be parsed.
    """
    try:
        # Not splitlines, which also splits at characters that JSON allows inside a string.
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: {error}. Give a text file with a prompt per line, or a .jsonl.") from error
    numbered = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UsageError(f"--prompts {path} is empty. Give a text file with a prompt per line, or a .jsonl.")
    is_jsonl = path.suffix == ".jsonl"
    return [PictureSpec(_parse(line, source) if is_jsonl else {"prompt": line}, source) for source, line in numbered]


def number_seeds(prompts: Sequence[str], fields: Fields, source: str = "") -> list[PictureSpec]:
    """One spec per prompt. Seeds count up from that of the fields, or from 0."""
    first = fields.get("seed", 0)
    return [PictureSpec({**fields, "prompt": prompt, "seed": first + i}, source) for i, prompt in enumerate(prompts)]


def _parse(line: str, source: str) -> Fields:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not valid JSON ({error})") from error
    if not isinstance(found, dict) or "prompt" not in found:
        raise UsageError(f'{source}: must be an object with a prompt, such as {{"prompt": "red star", "seed": 1}}')
    return check_fields(found, source)


def check_fields(fields: Mapping[str, Any], source: str) -> Fields:
    """The fields with whole numbers converted where FIELDS has float. Raises UsageError, naming the field, for unknown
    names and wrong types."""
    unknown = sorted(fields.keys() - FIELDS.keys())
    if unknown:
        raise UsageError(f"{source}: unknown field {', '.join(unknown)}. Known fields: {', '.join(FIELDS)}.")
    checked = {}
    for name, value in fields.items():
        wanted = FIELDS[name]
        checked[name] = float(value) if wanted is float and type(value) is int and abs(value) < 2**53 else value
        if type(checked[name]) is not wanted:
            raise UsageError(f"{source}: {name} must be {_TYPE_NAMES[wanted]}: got {json.dumps(value)[:60]}")
    return checked


def parse_axis(text: str) -> Axis:
    """Parses "x-shift=-0.25,0,0.25". Raises UsageError for an unknown name or a value of the wrong type."""
    name, equals, values = text.partition("=")
    if not equals or name not in FLAGS:
        raise UsageError(
            f"--sweep {text}: give a setting and values: x-shift=-0.25,0,0.25. Settings: {', '.join(FLAGS)}."
        )
    kind = FIELDS[FLAGS[name]]
    try:
        return Axis(name, [kind(value.strip()) for value in values.split(",")])
    except ValueError:
        raise UsageError(f"--sweep {text}: each value of {name} must be {_TYPE_NAMES[kind]}") from None


def sweep(spec: PictureSpec, axes: Sequence[Axis]) -> list[PictureSpec]:
    """The spec with every combination of the axes' values; the last axis varies fastest."""
    specs = [spec]
    for axis in axes:
        specs = [PictureSpec({**one.fields, axis.field: value}, one.source) for one in specs for value in axis.values]
    return specs
