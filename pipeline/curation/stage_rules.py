"""The rules of each training stage, and how a TOML file overrides them."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, get_origin, get_type_hints

from pipeline.core.errors import UsageError
from pipeline.core.records import Rating
from pipeline.core.text_files import read_text
from pipeline.curation.dedup import NEAR_BITS
from pipeline.curation.leave_out import LeftOut
from pipeline.curation.quality import ERA_WORDS, PRESETS
from pipeline.sources import SOURCES
from pipeline.tagging.tags import EXCLUDED, IMPLIED, TagReader, TagRules, read_list, read_pairs

_SHIPPED = Path(__file__).parent / "rules"
# Fields that name a file. A selection depends on the content of the file, not on its path.
FILES: Final = ("artists_file", "aliases", "implications", "blacklist", "leave_out_file")


@dataclass(frozen=True, kw_only=True)
class ScoreRange:
    """Both ends are included."""

    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The requirements of a stage, and what happens to tags. () admits everything."""

    min_side: int  # pixels of the shorter side; smaller pictures would be enlarged to fill a crop
    max_aspect: float = 4.0  # longer side / shorter side
    sources: tuple[str, ...] = SOURCES
    ratings: tuple[str, ...] = tuple(rating.value for rating in Rating)
    excluded: tuple[str, ...] = tuple(sorted(EXCLUDED))  # pictures with one of these tags are refused
    # Tags, raw or as words, after aliases: pictures without any of these, or without all of those, are refused.
    required_any: tuple[str, ...] = ()
    required_all: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()  # pictures, works, artists and files that are refused: see leave_out.py
    leave_out_file: str = ""  # text file with more of them, one per line
    preset: str = "kohaku"  # of the quality words
    quality: tuple[str, ...] = ()  # admits only pictures with one of these quality words
    eras: tuple[str, ...] = ()  # admits only pictures with one of these era words
    artists: tuple[str, ...] = ()  # admits only these artists, among pictures from artist_sources
    artists_file: str = ""  # text file with more artists, one per line
    artist_sources: tuple[str, ...] = ("pixiv",)
    scores: Mapping[str, ScoreRange] = field(default_factory=dict)  # by <scorer>.<label> of scores/<scorer>/
    aliases: str = "aliases.txt"  # path, or a file of pipeline/curation/rules; "" for none
    implications: str = "implications.txt"
    implied: str = "add"  # add | drop | keep: see tags.IMPLIED
    blacklist: str = "blacklist.txt"
    # Largest difference between the perceptual hashes of near copies, in bits up to 4; thumbnails then decide. In a
    # file of rules `false` is -1: only files with equal bytes are copies.
    near_copies: int = NEAR_BITS


# At 64 pixels the demo cannot learn from blurred pictures or pictures of several objects.
_DEMO_EXCLUDED = ("blurry", "film_grain", "multiple_objects")

# The HDM report adds a set chosen by hand to the stages from 512 on: name its Pixiv artists in a rules file.
# The 1024 stage deliberately has both ends of the quality scale, so that negative prompts work (report, section 4.2).
RULES: Final = {
    # The demo's pictures have all of their tags: implied ones would only make its texts longer.
    "demo": Rules(min_side=64, excluded=tuple(sorted(EXCLUDED)) + _DEMO_EXCLUDED, implied="keep"),
    "256": Rules(min_side=256),
    "512": Rules(min_side=384),
    "768": Rules(min_side=512),
    "1024": Rules(
        min_side=768,
        quality=("masterpiece", "best quality", "low quality", "worst quality"),
        eras=("newest", "recent", "old"),
    ),
}

_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "sources": SOURCES,
    "artist_sources": SOURCES,
    "ratings": tuple(rating.value for rating in Rating),
    "preset": tuple(PRESETS),
    "quality": tuple(dict.fromkeys(word for preset in PRESETS.values() for word in preset.words)),
    "eras": ERA_WORDS,
    "implied": IMPLIED,
}
_LOWEST: Final = {"min_side": 0, "max_aspect": 1, "near_copies": 0}
_HIGHEST: Final = {"near_copies": NEAR_BITS}
_TYPES: Final = {int: "a whole number", float: "a number", str: "a text", tuple: "a list of texts"}


def stage_rules(stage: str, preset: str | None = None, file: str | None = None) -> Rules:
    """The rules of a stage, overridden by a TOML file, overridden by a preset. Raises UsageError as `override` does."""
    rules = override(RULES[stage], Path(file)) if file else RULES[stage]
    return replace(rules, preset=preset) if preset else rules


def override(rules: Rules, path: Path) -> Rules:
    """The rules with the fields that a TOML file sets. Files that it names are looked for beside it, then among ours.

    Raises UsageError if a field is unknown, or its value has another type or is not a known word.
    """
    try:
        given = tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--rules {path}: {error}; give a TOML file such as {_SHIPPED / 'example.toml'}") from error
    hints = get_type_hints(Rules)
    known = ", ".join(field.name for field in fields(Rules))
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if name == "near_copies" and value is False:
            changes[name] = -1
            continue
        if name not in hints:
            raise UsageError(f"--rules {path}: no rule is called {name}; known are {known}")
        changes[name] = _scores(path, value) if name == "scores" else _typed(path, name, value, hints[name], known)
        beside = path.absolute().parent / str(value)
        if name in FILES and beside.is_file():
            changes[name] = str(beside)
    return replace(rules, **changes)


def _typed(path: Path, name: str, value: Any, hint: Any, known: str) -> Any:
    """The value of a field, converted to the field's type."""
    wanted = get_origin(hint) or hint
    texts = wanted is tuple and isinstance(value, list) and all(isinstance(each, str) for each in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (texts or (wanted is str and isinstance(value, str)) or (wanted is int and whole)
            or (wanted is float and (whole or isinstance(value, float)))):  # fmt: skip
        raise UsageError(f"--rules {path}: {name} = {value!r} must be {_TYPES[wanted]}; known rules are {known}")
    if name in _LOWEST and not _LOWEST[name] <= value < math.inf:  # also refuses NaN
        raise UsageError(f"--rules {path}: {name} = {value!r} must be a number from {_LOWEST[name]} on")
    if name in _HIGHEST and value > _HIGHEST[name]:
        raise UsageError(f"--rules {path}: {name} = {value!r} must be at most {_HIGHEST[name]}, or false")
    words = value if texts else [value]
    unknown = [word for word in words if name in _WORDS and word not in _WORDS[name]]
    if unknown:
        raise UsageError(f"--rules {path}: {name} cannot be {unknown[0]!r}; known are {', '.join(_WORDS[name])}")
    return wanted(value)


def _scores(path: Path, given: Any) -> dict[str, ScoreRange]:
    """Parses [scores."<scorer>.<label>"] tables with min, max or both."""
    form = '[scores."<scorer>.<label>"] with min and max, both numbers and one of them optional'
    ranges: dict[str, ScoreRange] = {}
    for name, ends in given.items() if isinstance(given, dict) else [("scores", given)]:
        numbers = isinstance(ends, dict) and all(
            type(end) in (int, float) and math.isfinite(end) for end in ends.values()
        )
        scorer, dot, label = name.partition(".")
        if not (numbers and ends and ends.keys() <= {"min", "max"} and scorer and dot and label):
            raise UsageError(f"--rules {path}: {name} = {ends!r} is no range of a score; write {form}")
        ranges[name] = ScoreRange(**ends)
        if ends.keys() == {"min", "max"} and ends["min"] > ends["max"]:
            raise UsageError(f"--rules {path}: {name} = {ends!r} holds no score; its min must not be above its max")
    return ranges


def with_lists(rules: Rules) -> Rules:
    """The rules with the entries of `artists_file` and `leave_out_file`. Raises UsageError for an unreadable entry."""
    lists: dict[str, Any] = {}
    for name in ("artists", "leave_out"):
        file = getattr(rules, f"{name}_file")
        listed = read_list(_text(f"{name}_file", file))
        lists |= {name: tuple(dict.fromkeys([*getattr(rules, name), *listed])), f"{name}_file": ""}
    try:
        LeftOut.of(lists["leave_out"])
    except ValueError as error:
        raise UsageError(f"leave_out: {error}; correct {rules.leave_out_file or 'the rule'}") from error
    return replace(rules, **lists)


def tag_rules(rules: Rules) -> TagRules:
    """The rules for tags, read from their files. Raises UsageError if a file is missing or malformed."""
    pairs: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in ("aliases", "implications"):
        path = getattr(rules, name)
        try:
            pairs[name] = read_pairs(_text(name, path))
        except ValueError as error:
            raise UsageError(f"{name} file {path}: {error}") from error
    for tag, names in pairs["aliases"].items():
        if len(names) > 1:
            listed = ", ".join(names)
            raise UsageError(f"aliases file {rules.aliases}: {tag} has {len(names)} names, {listed}; keep one")
    tags = TagRules(
        excluded=frozenset(rules.excluded),
        aliases={tag: names[0] for tag, names in pairs["aliases"].items()},
        implications=pairs["implications"],
        implied=rules.implied,  # type: ignore[arg-type]  # one of IMPLIED: see _typed
        blacklist=frozenset(read_list(_text("blacklist", rules.blacklist))),
    )
    try:
        TagReader(tags)
    except ValueError as error:
        raise UsageError(f"{error}; correct {rules.aliases} or {rules.implications}") from error
    return tags


def _text(name: str, path: str) -> str:
    """The content of a file that a rule names, "" if it names none."""
    try:
        return read_text(_SHIPPED / path) if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'{name} = {path!r} cannot be read ({error}); give the path of a text file, or ""') from error
