"""What is to be drawn, as people write it down: prompt files, their settings line by line, and the axes of a sweep.

Knows the names and kinds of the settings, which are those of `pictures.Settings`, but not their ranges, nor torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError

# Of a line of a prompt file, and of what a picture says of itself.
FIELDS: dict[str, type] = {
    "prompt": str,
    "negative": str,
    "width": int,
    "height": int,
    "seed": int,
    "steps": int,
    "guidance": float,
    "sampler": str,
    "shift": float,
    "x_shift": float,
    "y_shift": float,
    "zoom": float,
    "selection_rate": float,
    "unconditional_rate": float,
}
_KINDS = {str: "a text in quotes", int: "a whole number", float: "a number"}
# On the command line as its flag is called, so that nobody takes it for the camera's.
_AXES = {("time-shift" if name == "shift" else name.replace("_", "-")): name for name in FIELDS if name != "prompt"}

Fields = Mapping[str, Any]  # some of FIELDS; what is missing has a default


@dataclass(frozen=True)
class Wish:
    """A picture that somebody wants."""

    fields: Fields
    where: str = ""  # the file and line that say so, for messages


@dataclass(frozen=True)
class Axis:
    """One setting with all its values in a sweep."""

    name: str  # as its flag is called, without the dashes
    values: Sequence[Any]

    @property
    def field(self) -> str:
        return _AXES[self.name]

    @property
    def labels(self) -> list[str]:
        return [
            f"{self.name} {value:g}" if isinstance(value, float) else f"{self.name} {value}" for value in self.values
        ]


def read_prompts(path: Path) -> list[Wish]:
    """The wishes of a text file, one prompt a line, or of a .jsonl file, one object of FIELDS a line; empty lines are
    passed over. UsageError, which names the line, for what cannot be understood."""
    try:
        # Not splitlines: it also breaks at characters that JSON allows inside a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: {error}; give a text file of one prompt a line, or a .jsonl") from error
    places = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not places:
        raise UsageError(f"--prompts {path} is empty; give a text file of one prompt a line, or a .jsonl")
    if path.suffix != ".jsonl":
        return [Wish({"prompt": line}, where) for where, line in places]
    return [Wish(_parsed(line, where), where) for where, line in places]


def numbered(prompts: Sequence[str], fields: Fields, where: str = "") -> list[Wish]:
    """A wish for each prompt; their seeds count up from that of the fields, or from 0."""
    first = fields.get("seed", 0)
    return [Wish({**fields, "prompt": prompt, "seed": first + i}, where) for i, prompt in enumerate(prompts)]


def _parsed(line: str, where: str) -> Fields:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no JSON ({error})") from error
    if not isinstance(found, dict) or "prompt" not in found:
        raise UsageError(f'{where}: must be an object with a prompt, such as {{"prompt": "red star", "seed": 1}}')
    return checked_fields(found, where)


def checked_fields(found: Mapping[str, Any], where: str) -> Fields:
    """The fields in the types of FIELDS. UsageError, which names the field, for unknown ones and other types."""
    unknown = sorted(found.keys() - FIELDS.keys())
    if unknown:
        raise UsageError(f"{where}: unknown field {', '.join(unknown)}; there are {', '.join(FIELDS)}")
    return {name: _typed(name, value, where) for name, value in found.items()}


def _typed(name: str, value: Any, where: str) -> Any:
    wanted = FIELDS[name]
    if wanted is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not wanted:
        raise UsageError(f"{where}: {name} must be {_KINDS[wanted]}: got {json.dumps(value)[:60]}")
    return value


def parse_axis(text: str) -> Axis:
    """ "x-shift=-0.25,0,0.25"; UsageError for another name, or values of another kind."""
    name, equals, listed = text.partition("=")
    if not equals or name not in _AXES:
        raise UsageError(f"--sweep {text}: give a name and values, as x-shift=-0.25,0,0.25; names: {', '.join(_AXES)}")
    kind = FIELDS[_AXES[name]]
    try:
        values = [kind(value.strip()) for value in listed.split(",")]
    except ValueError:
        raise UsageError(f"--sweep {text}: each value of {name} must be {_KINDS[kind]}") from None
    return Axis(name, values)


def swept(wish: Wish, axes: Sequence[Axis]) -> list[Wish]:
    """The wish once for every combination, the last axis moving fastest; alone where there is no axis."""
    wishes = [wish]
    for axis in axes:
        wishes = [Wish({**before.fields, axis.field: value}, wish.where) for before in wishes for value in axis.values]
    return wishes
