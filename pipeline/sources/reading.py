"""How the fields of raw files are read where their values alone do not say it, decided from samples of the files.

What is not understood is refused here, before any work, or named in the plan with the flag that resolves it.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Final, Literal

from pipeline.core.records import Post, Rejected
from pipeline.sources.dates import parse_time
from pipeline.sources.tag_lists import tag_items
from pipeline.sources.values import UnreadableField, first, is_missing, parse_code

Ratings = Literal["auto", "legacy", "current"]
Separator = Literal["auto", "comma", "space"]
Row = Mapping[str, Any]

_SHOWN: Final = 3  # sample values in a message
_REPORTED: Final = 0.01  # share of values from which a line of the plan reports them
_REFUSED: Final = 0.5  # share of rows from which the whole file is refused
_CLEAR: Final = 0.9  # share of the texts that must agree on the separator
# Danbooru's ratings were s (safe), q and e until January 2022. Since then about a fifth of its pictures have been g. So
# many s without a g, and the file is from before.
_ENOUGH: Final = 50


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Applies to the rows of a raw file before its source's functions read them."""

    constants: tuple[tuple[str, str], ...] = ()  # fields that the folders' names give: rating=e/
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()  # names of the class labels of a field
    commas: tuple[str, ...] = ()  # fields whose text is separated by commas
    legacy_ratings: bool = False  # Danbooru's s is safe

    def row(self, row: Row) -> dict[str, Any]:
        """The row with names for class labels, lists for text with commas, and "safe" for an s that means it.

        Raises UnreadableField for a class label without a name.
        """
        read = dict(self.constants) | dict(row)
        for name, names in self.labels:
            read[name] = _named(read.get(name), name, names)
        for name in self.commas:
            if isinstance(read.get(name), str):
                read[name] = tag_items(read[name], commas=True)
        if self.legacy_ratings and _letter(read.get("rating")) == "s":
            read["rating"] = "safe"
        return read


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What is known of some raw files of one layout."""

    reading: Reading
    lines: tuple[str, ...]  # for the plan: the meaning of each column, with the evidence, and what is uncertain
    problems: tuple[str, ...] = ()  # any of them prevents the ingest


@dataclass(frozen=True, kw_only=True)
class ReadingFlags:
    """What the command line decides, in place of the samples."""

    ratings: Ratings = "auto"
    separator: Separator = "auto"


@dataclass
class _Findings:
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def profile(
    site: ModuleType,
    rows: Sequence[Row],
    features: Mapping[str, Any],
    constants: Mapping[str, str],
    asked: ReadingFlags,
) -> Profile:
    """Decides how to read the layout of which these rows, without pictures, are samples.

    features: those that Hugging Face's libraries write into the footer, by field. constants: fields from folder names.
    """
    found = _Findings()
    fields = {name for row in rows for name in row} | constants.keys()
    reading = Reading(constants=tuple(sorted(constants.items())), labels=_labels(features, fields))
    for name, names in reading.labels:
        found.lines.append(f"{name}: class labels, named in the footer ({len(names)}: {', '.join(names[:_SHOWN])} ...)")
    for name, value in reading.constants:
        found.lines.append(f"{name}: from the folder's name ({name}={value})")
    reading = replace(reading, commas=_comma_fields(site, rows, asked.separator, found))
    reading = replace(reading, legacy_ratings=_is_legacy(site, rows, reading, asked.ratings, found))
    _check_rows(site, rows, reading, found)
    return Profile(reading=reading, lines=tuple(found.lines), problems=tuple(found.problems))


def _labels(features: Mapping[str, Any], fields: Collection[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Names of the class labels of each field, also of lists of them."""
    named = {}
    for name in sorted(fields & features.keys()):
        feature = features[name]
        while isinstance(feature, list | dict) and "names" not in feature:
            inner = feature[0] if isinstance(feature, list) and feature else None
            feature = feature.get("feature") if isinstance(feature, dict) else inner
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            named[name] = tuple(map(str, feature["names"]))
    return tuple(named.items())


def _named(value: Any, name: str, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(label, name, names) for label in value]
    if is_missing(value) or value == -1:  # -1: not labelled
        return None
    if not (isinstance(value, int) and 0 <= value < len(names)):
        raise UnreadableField(f"{name} is the class label {value!r}, but there are {len(names)} names")
    return names[value]


def _comma_fields(site: ModuleType, rows: Sequence[Row], asked: Separator, found: _Findings) -> tuple[str, ...]:
    """The tag fields whose text is separated by commas."""
    texts = {name: [row[name] for row in rows if isinstance(row.get(name), str)] for name in site.TAG_COLUMNS}
    fields: dict[bool, list[str]] = {True: [], False: []}
    for name, given in texts.items():
        plain = [text.strip() for text in given if text.strip() and not text.lstrip().startswith(("[", "{"))]
        with_commas = [text for text in plain if _has_commas(text)]
        several = len(with_commas) + sum(bool(re.search(r"\s", text)) for text in plain if not _has_commas(text))
        share = len(with_commas) / max(1, several)
        if asked == "auto" and 1 - _CLEAR < share < _CLEAR:
            found.problems.append(
                f"{name} is text in which commas separate the tags in {share:.0%} of {several} samples, spaces in the "
                f"others, for example {_shown([with_commas[0], *plain])}: give --tag-separator comma or space"
            )
        if plain:
            fields[asked == "comma" or (asked == "auto" and share >= _CLEAR)].append(name)
    for commas, names in fields.items():
        if names:
            examples = [text for name in names for text in texts[name] if text.strip()]
            between = "commas" if commas else "spaces"
            found.lines.append(f"{', '.join(names)}: text, {between} between tags, for example {_shown(examples[:1])}")
    return tuple(fields[True])


def _has_commas(text: str) -> bool:
    """True if the commas of a text separate its tags, rather than belong to one such as "1,000_yen"."""
    spaces = len(re.findall(r"(?<!,)\s+", text))
    return bool(re.search(r",\s", text)) or ("," in text and text.count(",") >= spaces)


def _is_legacy(site: ModuleType, rows: Sequence[Row], reading: Reading, asked: Ratings, found: _Findings) -> bool:
    """Whether an s in the field `rating` is Danbooru's "safe" of before 2022."""
    if site.RATING_COLUMNS != ("rating",):
        return False
    ratings = Counter(_letter(_readable(row, reading).get("rating")) for row in rows)
    values = ", ".join(f"{name or 'none'} {count / len(rows):.0%}" for name, count in ratings.most_common(6))
    safe = ratings["s"]
    unclear = safe and not any(ratings[name] for name in ("g", "general", "safe", "sensitive"))
    legacy = asked == "legacy" or (asked == "auto" and bool(unclear) and safe >= _ENOUGH)
    if any(not is_missing(row.get("rating")) for row in rows) or "rating" in dict(reading.constants):
        meaning = "s is safe, as before 2022" if legacy else "s is sensitive, as since 2022"
        found.lines.append(f"rating: {values}" + (f"; {meaning}" if safe else ""))
    if unclear and not legacy and asked == "auto":
        found.lines.append(
            f"rating: UNCERTAIN: {safe} samples are s and none is g. Before 2022 s meant safe: give --ratings legacy "
            "if the file is that old, or --ratings current"
        )
    return legacy


def _letter(value: Any) -> str:
    return re.sub(r"^rating\W", "", parse_code(value))


def _readable(row: Row, reading: Reading) -> dict[str, Any]:
    try:
        return reading.row(row)
    except UnreadableField:
        return dict(row)


def _check_rows(site: ModuleType, rows: Sequence[Row], reading: Reading, found: _Findings) -> None:
    """Reads the samples as an ingest would, and reports what it does not understand."""
    unread, no_id, rejected = list[str](), list[str](), Counter[str]()
    dates, unknown_dates = 0, list[Any]()
    for row in rows:
        try:
            read = reading.row(row)
            date = first(read, *site.DATE_COLUMNS)
            dates += date is not None
            if date is not None and parse_time(date) is None:
                unknown_dates.append(date)
            outcome: Post | Rejected = site.read_row(read, ())
        except UnreadableField as error:
            unread.append(str(error))
            continue
        except ValueError as error:
            no_id.append(str(error))
            continue
        if isinstance(outcome, Rejected) and outcome.reason == "unknown rating":
            rejected[outcome.detail] += 1
    count = max(1, len(rows))
    if unread:
        text = f"{len(unread) / count:.0%} of {count} samples are not understood: {_listed(unread)}"
        if len(unread) > _REFUSED * count:
            found.problems.append(f"{text}. Name the column that holds the field with --map COLUMN=FIELD")
        else:
            found.lines.append(f"UNCERTAIN: {text}; such rows are rejected")
    if len(no_id) >= _REPORTED * count:
        found.lines.append(f"id: UNCERTAIN: {len(no_id) / count:.0%} have none that can be read: {_listed(no_id)}")
    if rejected:
        found.lines.append(
            f"rating: UNCERTAIN: unknown in {rejected.total() / count:.0%}: {_listed(rejected)}; such rows are rejected"
        )
    if dates and len(unknown_dates) >= _REPORTED * dates:
        found.lines.append(
            f"{' or '.join(site.DATE_COLUMNS)}: UNCERTAIN: {len(unknown_dates) / dates:.0%} of the dates cannot be "
            f"read, for example {_shown(unknown_dates)}; such rows get no era"
        )


def _listed(texts: Collection[str]) -> str:
    return "; ".join(list(dict.fromkeys(texts))[:_SHOWN])


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(repr(value)[:60] for value in list(dict.fromkeys(map(str, values)))[:_SHOWN])
