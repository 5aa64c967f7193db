"""--set field=value: text -> typed fields of a frozen dataclass. Knows nothing of the recipe or the model."""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.core.errors import UsageError

Config = TypeVar("Config")


def parse(settings: Sequence[str]) -> dict[str, str]:
    """["optimizer.kind=muon", ...] -> values by field. The last value of a field wins. UsageError without an "="."""
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (equals and name.strip()):
            raise UsageError(f"--set {setting}: give a field and its value, as in --set samples=1000")
        values[name.strip()] = text.strip()
    return values


def field_types(config: type[Any]) -> dict[str, Any]:
    """The annotation of every field by name. Fields of nested dataclasses are named outer.inner."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{inner}": kind for inner, kind in field_types(hint).items()}  # type: ignore[arg-type]
        else:
            found[name] = hint
    return found


def typed(settings: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Each text converted to its field's annotation. UsageError for an unknown field or a value of another type."""
    values = {}
    for name, text in settings.items():
        if name not in known:
            raise UsageError(f"--set {name}={text}: {_unknown(name, known)}")
        try:
            values[name] = _value(text, known[name])
        except ValueError as error:
            raise UsageError(f"--set {name}={text}: {error}") from error
    return values


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with these fields replaced at once, because some are valid only together.

    Raises the config's ValueError for invalid values.
    """
    nested: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, value in values.items():
        outer, dot, inner = name.partition(".")
        if dot:
            nested.setdefault(outer, {})[inner] = value
        else:
            own[outer] = value
    own |= {outer: replaced(getattr(config, outer), inner_values) for outer, inner_values in nested.items()}
    return dataclasses.replace(config, **own)  # type: ignore[type-var]


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    group = [field for field in known if field.startswith(f"{name}.")]
    if group:
        return f"{name} is a group of fields: set one of {', '.join(group)}"
    # Fields with the same last part count as near: learning_rate suggests optimizer.learning_rate.
    last = name.rpartition(".")[2]
    near = [field for field in known if field.rpartition(".")[2] == last]
    near += difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    by_last = {field.rpartition(".")[2]: field for field in known}
    near += [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.8)]
    nearest = list(dict.fromkeys(near))[:3]
    if nearest:
        return f"there is no field {name}; nearest: {', '.join(nearest)}"
    return f"there is no field {name}; fields: {', '.join(known)}"


def _value(text: str, hint: Any) -> Any:
    """The text as a value of the annotation. ValueError that says what the field takes."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text
    if origin in (Union, types.UnionType):
        words = {word: word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)}
        words |= {"none": None} if type(None) in choices else {}
        if text in words:
            return words[text]
        (inner,) = [choice for choice in choices if choice is not type(None) and get_origin(choice) is not Literal]
        try:
            return _value(text, inner)
        except ValueError as error:
            raise ValueError(f"{error}, or {' or '.join(words)}") from error
    if origin is tuple:
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != len(choices):
            raise ValueError(f"must be {len(choices)} values separated by commas")
        return tuple(_value(part, choice) for part, choice in zip(parts, choices, strict=True))
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError("must be true or false")
        return text == "true"
    if hint in (int, float):
        try:
            number = hint(text)
        except ValueError:
            raise ValueError("must be a whole number" if hint is int else "must be a number") from None
        if not math.isfinite(number):
            raise ValueError("must be a finite number")
        return number
    assert hint is str, f"--set cannot read a field of type {hint}"
    if not text:
        raise ValueError("must not be empty")
    return text
