"""What each training stage asks of a picture and its text: the rules, and how a TOML file overrides them."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, get_origin, get_type_hints

from pipeline.core.errors import UsageError
from pipeline.core.records import Rating
from pipeline.curation.quality import ERA_WORDS, PRESETS
from pipeline.sources import SOURCES
from pipeline.tagging.tags import EXCLUDED, IMPLIED, TagReader, TagRules, read_list, read_pairs

_SHIPPED = Path(__file__).parent / "rules"
# Fields that name a file: its content decides, wherever it lies.
FILES: Final = ("artists_file", "aliases", "implications", "blacklist")


@dataclass(frozen=True, kw_only=True)
class ScoreRange:
    """Both ends included."""

    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a stage asks of a picture, and what becomes of its tags."""

    min_side: int  # pixels of the shorter side: below it the crop would be enlarged
    max_aspect: float = 4.0  # longer side / shorter side
    sources: tuple[str, ...] = SOURCES
    ratings: tuple[str, ...] = tuple(rating.value for rating in Rating)
    excluded: tuple[str, ...] = tuple(sorted(EXCLUDED))  # tags that a picture must not have
    preset: str = "kohaku"  # of the quality words
    quality: tuple[str, ...] = ()  # only pictures with one of these words; () asks nothing
    eras: tuple[str, ...] = ()  # the same
    artists: tuple[
        str, ...
    ] = ()  # only pictures of these artists, where they come from artist_sources; () asks nothing
    artists_file: str = ""  # more of them, one a line
    artist_sources: tuple[str, ...] = ("pixiv",)
    scores: Mapping[str, ScoreRange] = field(default_factory=dict)  # by <scorer>.<label> of scores/<scorer>/
    aliases: str = "aliases.txt"  # files of pipeline/rules, or paths; "" for none
    implications: str = "implications.txt"
    implied: str = "add"  # add | drop | keep: see tags.Implied
    blacklist: str = "blacklist.txt"


# At 64 pixels a second object or a spoilt picture only blurs the lesson.
_DEMO_EXCLUDED = ("blurry", "film_grain", "multiple_objects")

# The HDM report's extra set of the stages from 512 on is chosen by hand: name its Pixiv artists in a rules file.
# The 1024 stage keeps both ends on purpose, so that negative prompts work (HDM report, section 4.2).
RULES: Final = {
    # What the demo draws is tagged whole: more tags would only lengthen its texts.
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
_LOWEST: Final = {"min_side": 0, "max_aspect": 1}
_KINDS: Final = {int: "a whole number", float: "a number", str: "a text", tuple: "a list of texts"}


def stage_rules(stage: str, preset: str | None = None, file: str | None = None) -> Rules:
    """The stage's rules, overridden by a TOML file, overridden by --preset. UsageError where the file is wrong."""
    rules = override(RULES[stage], Path(file)) if file else RULES[stage]
    return replace(rules, preset=preset) if preset else rules


def override(rules: Rules, path: Path) -> Rules:
    """The rules with the fields that a TOML file gives; files that it names lie beside it, or are ours.

    UsageError where a field is unknown, of another type or of an unknown word.
    """
    try:
        given = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--rules {path}: {error}; give a TOML file such as {_SHIPPED / 'example.toml'}") from error
    hints = get_type_hints(Rules)
    known = ", ".join(field.name for field in fields(Rules))
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if name not in hints:
            raise UsageError(f"--rules {path}: no rule is called {name}; known are {known}")
        changes[name] = _scores(path, value) if name == "scores" else _typed(path, name, value, hints[name], known)
        beside = path.absolute().parent / str(value)
        if name in FILES and beside.is_file():
            changes[name] = str(beside)
    return replace(rules, **changes)


def _typed(path: Path, name: str, value: Any, hint: Any, known: str) -> Any:
    """The value as the field's type."""
    kind = get_origin(hint) or hint
    texts = kind is tuple and isinstance(value, list) and all(isinstance(each, str) for each in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (texts or (kind is str and isinstance(value, str)) or (kind is int and whole)
            or (kind is float and (whole or isinstance(value, float)))):  # fmt: skip
        raise UsageError(f"--rules {path}: {name} = {value!r} must be {_KINDS[kind]}; known rules are {known}")
    if name in _LOWEST and not _LOWEST[name] <= value < math.inf:  # nor what is not a number
        raise UsageError(f"--rules {path}: {name} = {value!r} must be a number from {_LOWEST[name]} on")
    words = value if texts else [value]
    strange = [word for word in words if name in _WORDS and word not in _WORDS[name]]
    if strange:
        raise UsageError(f"--rules {path}: {name} cannot be {strange[0]!r}; known are {', '.join(_WORDS[name])}")
    return kind(value)


def _scores(path: Path, given: Any) -> dict[str, ScoreRange]:
    """[scores."<scorer>.<label>"] min = ..., max = ..."""
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


def with_artists(rules: Rules) -> Rules:
    """The rules with the artists of their file."""
    listed = read_list(_text("artists_file", rules.artists_file))
    return replace(rules, artists=tuple(dict.fromkeys([*rules.artists, *listed])), artists_file="")


def tag_rules(rules: Rules) -> TagRules:
    """What the rules and their files say of tags. UsageError where a file is missing or wrong."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in ("aliases", "implications"):
        path = getattr(rules, name)
        try:
            found[name] = read_pairs(_text(name, path))
        except ValueError as error:
            raise UsageError(f"{name} file {path}: {error}") from error
    several = {tag: names for tag, names in found["aliases"].items() if len(names) > 1}
    if several:
        tag, names = next(iter(several.items()))
        raise UsageError(f"aliases file {rules.aliases}: {tag} has {len(names)} names, {', '.join(names)}; keep one")
    tags = TagRules(
        excluded=frozenset(rules.excluded),
        aliases={tag: names[0] for tag, names in found["aliases"].items()},
        implications=found["implications"],
        implied=rules.implied,  # type: ignore[arg-type]  # one of IMPLIED: see _typed
        blacklist=frozenset(read_list(_text("blacklist", rules.blacklist))),
    )
    try:
        TagReader(tags)
    except ValueError as error:
        raise UsageError(f"{error}; mend {rules.aliases} or {rules.implications}") from error
    return tags


def _text(name: str, path: str) -> str:
    """The content of a file that the rules name; "" where they name none."""
    try:
        return (_SHIPPED / path).read_text() if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'{name} = {path!r} cannot be read ({error}); give the path of a text file, or ""') from error
