"""How the fields of raw files are read where their values alone do not say it, decided from samples of the files.

What is not understood is refused here, before any work, or named in the plan with the flag that resolves it.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Final, Literal

from pipeline.core.records import Post, Rejected
from pipeline.sources.dates import parse_time
from pipeline.sources.pictures import IMAGE_COLUMNS
from pipeline.sources.tag_lists import LEAST_SCORE, has_scores, structured, tag_items
from pipeline.sources.values import UnreadableField, first, is_missing, parse_code, parse_count, parse_id

Ratings = Literal["auto", "legacy", "current"]
Separator = Literal["auto", "comma", "space"]
Row = Mapping[str, Any]

UNCERTAIN: Final = "UNCERTAIN"  # in each line of a plan that needs a decision

_SHOWN: Final = 3  # sample values in a message
_REPORTED: Final = 0.01  # share of values from which a line of the plan reports them
_REFUSED: Final = 0.5  # share of rows from which the whole file is refused
_CLEAR: Final = 0.9  # share of the texts that must agree on the separator
# Danbooru's ratings were s (safe), q and e until January 2022. Since then about a fifth of its pictures have been g. So
# many s without a g, and the file is from before.
_ENOUGH: Final = 50
_MOST_RATING: Final = 3  # as a number


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Applies to the rows of a raw file before its source's functions read them."""

    constants: tuple[tuple[str, str], ...] = ()  # fields that the folders' names give: rating=e/
    # Names of the class labels of a field, or of one inside it: tags.category.
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    commas: tuple[str, ...] = ()  # fields whose text is separated by commas
    legacy_ratings: bool = False  # Danbooru's s is safe

    def row(self, row: Row) -> dict[str, Any]:
        """The row with text for bytes that hold it, names for class labels, lists for text with commas, and "safe" for
        an s that means it.

        Raises UnreadableField for a class label without a name.
        """
        read = {name: _text(value) if name not in IMAGE_COLUMNS else value for name, value in row.items()}
        read |= {name: value for name, value in self.constants if is_missing(read.get(name))}
        for path, names in self.labels:
            name, *inner = path.split(".")
            read[name] = _named(read.get(name), path, inner, names)
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
    samples: Sequence[tuple[Mapping[str, str], Row]],
    features: Mapping[str, Any],
    asked: ReadingFlags,
    admit: Collection[str] = (),
) -> Profile:
    """Decides how to read the layout of which these rows, without pictures, are samples.

    samples: each with the fields that its folders' names give. features: those that Hugging Face's libraries write into
    the footer, by field. admit: reasons that reject no row.
    """
    found = _Findings()
    _check_folders([(given, Reading().row(row)) for given, row in samples], found)
    rows = [Reading(constants=tuple(given.items())).row(row) for given, row in samples]
    reading = Reading(labels=_labels(features, {name for row in rows for name in row}))
    for name, names in reading.labels:
        more = " ..." if len(names) > _SHOWN else ""
        listed = ", ".join(names[:_SHOWN])
        found.lines.append(f"{name}: class labels, named in the footer ({len(names)}: {listed}{more})")
    reading = replace(reading, commas=_comma_fields(site, rows, asked.separator, found))
    reading = replace(reading, legacy_ratings=_is_legacy(site, rows, reading, asked.ratings, found))
    _check_tags(site, rows, reading, found)
    _check_numbers(site, rows, found)
    _check_rows(site, rows, reading, admit, found)
    return Profile(reading=reading, lines=tuple(found.lines), problems=tuple(found.problems))


def _check_folders(samples: Sequence[tuple[Mapping[str, str], Row]], found: _Findings) -> None:
    """Reports the fields that folder names give, and columns that say something else."""
    values: dict[str, dict[str, None]] = {}
    differing: dict[str, str] = {}
    for given, row in samples:
        for name, value in given.items():
            values.setdefault(name, {})[value] = None
            if not is_missing(row.get(name)) and parse_code(row[name]) != parse_code(value):
                differing.setdefault(name, f"{row[name]!r} in {name}={value}")
    for name, listed in values.items():
        found.lines.append(f"{name}: from the folder's name ({', '.join(f'{name}={value}' for value in listed)})")
    for name, example in differing.items():
        found.lines.append(
            f"{name}: {UNCERTAIN}: the column differs from the folder's name, for example {example}; the column counts"
        )


def _labels(features: Mapping[str, Any], fields: Collection[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Names of the class labels of each field, also of lists of them."""
    named: dict[str, tuple[str, ...]] = {}
    for name in sorted(fields & features.keys()):
        named |= dict(_labels_in(features[name], name))
    return tuple(named.items())


def _labels_in(feature: Any, path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(feature, list) and feature:
        yield from _labels_in(feature[0], path)
    elif isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
        if isinstance(names := feature.get("names"), list):
            yield path, tuple(map(str, names))
    elif isinstance(feature, dict) and isinstance(feature.get("_type"), str):
        yield from _labels_in(feature.get("feature"), path)
    elif isinstance(feature, dict):
        for name, inner in feature.items():
            yield from _labels_in(inner, f"{path}.{name}")


def _named(value: Any, path: str, inner: Sequence[str], names: Sequence[str]) -> Any:
    """The value with names for its class labels, which are in its fields `inner`, if any."""
    if isinstance(value, list):
        return [_named(item, path, inner, names) for item in value]
    if inner and isinstance(value, Mapping):
        return {**value, inner[0]: _named(value.get(inner[0]), path, inner[1:], names)}
    if is_missing(value) or value == -1:  # -1: not labelled
        return None
    if isinstance(value, str) and value in names:
        return value
    label = None if isinstance(value, bool) else parse_id(value)
    if label is None or label >= len(names):
        raise UnreadableField(f"{path} is the class label {value!r}, but there are {len(names)} names")
    return names[label]


def _text(value: Any) -> Any:
    """Text for bytes that hold it: some writers do not mark their columns as text."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _comma_fields(site: ModuleType, rows: Sequence[Row], asked: Separator, found: _Findings) -> tuple[str, ...]:
    """The tag fields whose text is separated by commas."""
    texts = {name: [row[name] for row in rows if isinstance(row.get(name), str)] for name in site.TAG_COLUMNS}
    fields: dict[bool, list[str]] = {True: [], False: []}
    for name, given in texts.items():
        texts[name] = given = [text for text in given if isinstance(structured(text), str) and not is_missing(text)]
        plain = [text.strip() for text in given]
        with_commas = [text for text in plain if _has_commas(text)]
        several = len(with_commas) + sum(bool(re.search(r"\s", text)) for text in plain if not _has_commas(text))
        share = len(with_commas) / max(1, several)
        if asked == "auto" and 1 - _CLEAR < share < _CLEAR:
            found.problems.append(
                f"{name} is text in which commas separate the tags in {share:.0%} of {several} samples, spaces in the "
                f"others, for example {_shown([with_commas[0], *plain])}: give --tag-separator comma or space"
            )
        elif asked == "auto" and min(share, 1 - share) * several >= max(1, _REPORTED * several):
            read = "commas" if share >= _CLEAR else "spaces"
            other = next(text for text in plain if _has_commas(text) != (share >= _CLEAR) and re.search(r"[\s,]", text))
            found.lines.append(
                f"{name}: {UNCERTAIN}: {read} separate the tags in {max(share, 1 - share):.0%} of the samples, and are "
                f"taken to do so in all, but not in {_shown([other])}: give --tag-separator comma or space"
            )
        if asked == "auto" and name.endswith(("tags", "tag_string", "general")):
            others = [text for text in plain if _has_other_separator(text)]
            if len(others) > _REFUSED * len(plain):
                found.problems.append(
                    f"{name} is text in which neither spaces nor commas separate the tags, for example "
                    f"{_shown(others)}: write them with commas, or give --tag-separator comma or space to ignore this"
                )
        if plain:
            fields[asked == "comma" or (asked == "auto" and share >= _CLEAR)].append(name)
    for commas, names in fields.items():
        if names:
            examples = [text for name in names for text in texts[name]]
            between = "commas" if commas else "spaces"
            found.lines.append(f"{', '.join(names)}: text, {between} between tags, for example {_shown(examples[:1])}")
    return tuple(fields[True])


def _has_commas(text: str) -> bool:
    """True if the commas of a text separate its tags, rather than belong to one such as "1,000_yen"."""
    spaces = len(re.findall(r"(?<!,)\s+", text))
    return bool(re.search(r",\s", text)) or ("," in text and text.count(",") >= spaces)


def _has_other_separator(text: str) -> bool:
    """True if semicolons, bars, tabs, lines or East Asian commas separate the tags of a text."""
    if _has_commas(text):
        return False
    text = re.sub(r"&#?\w+;", "", text)  # HTML entities
    lines = re.split(r"[\n\t]", text)
    if len(lines) > 1:
        return any(" " in line.strip() for line in lines)
    ends = len(re.findall(r"\w[;|]\s", text))
    return ends > 0.5 * len(re.findall(r"\s+", text)) or bool(
        re.fullmatch(r"[^\s;|、，]+([;|、，]\s*[^\s;|、，]+)+", text)
    )


def _is_legacy(site: ModuleType, rows: Sequence[Row], reading: Reading, asked: Ratings, found: _Findings) -> bool:
    """Whether an s in the field `rating` is Danbooru's "safe" of before 2022."""
    if site.RATING_COLUMNS != ("rating",):
        return False
    ratings = Counter(_letter(_readable(row, reading).get("rating")) for row in rows)
    values = ", ".join(f"{name or 'none'} {count / len(rows):.0%}" for name, count in ratings.most_common(6))
    safe = ratings["s"]
    unclear = safe and not any(ratings[name] for name in ("g", "general", "safe", "sensitive"))
    legacy = asked == "legacy" or (asked == "auto" and bool(unclear) and safe >= _ENOUGH)
    if any("rating" in row for row in rows):
        meaning = "s is safe, as before 2022" if legacy else "s is sensitive, as since 2022"
        found.lines.append(f"rating: {values}" + (f"; {meaning}" if safe else ""))
    _check_rating_numbers(ratings, found)
    if unclear and not legacy and asked == "auto":
        found.lines.append(
            f"rating: {UNCERTAIN}: {safe} samples are s and none is g. Before 2022 s meant safe: give --ratings legacy "
            "if the file is that old, or --ratings current"
        )
    return legacy


def _check_rating_numbers(ratings: Counter[str], found: _Findings) -> None:
    """Numbers are read as 0 general to 3 explicit. Refuses those that start from another number, reports the rest."""
    numbers = sorted(int(name) for name in ratings if re.fullmatch(r"-?\d+", name))
    if not numbers:
        return
    listed = ", ".join(map(str, numbers))
    if max(numbers) > _MOST_RATING and min(numbers) > 0:
        found.problems.append(
            f"rating has the numbers {listed}, but is read as 0 general, 1 sensitive, 2 questionable, 3 explicit: "
            "write the letters g, s, q and e in place of the numbers"
        )
    unclear = "" if numbers == list(range(_MOST_RATING + 1)) else f"{UNCERTAIN}: "
    found.lines.append(
        f"rating: {unclear}the numbers {listed} are read as 0 general, 1 sensitive, 2 questionable, 3 explicit"
        + ("; if they mean something else, write the letters g, s, q and e in their place" if unclear else "")
    )


def _check_tags(site: ModuleType, rows: Sequence[Row], reading: Reading, found: _Findings) -> None:
    """Reports tags that are not plain text, and what is left out of them; refuses lists that hold one long text."""
    for name in site.TAG_COLUMNS:
        values = [row[name] for row in rows if not is_missing(row.get(name))]
        texts = [value for value in values if isinstance(value, str) and not isinstance(structured(value), str)]
        if texts:
            found.lines.append(f"{name}: text that holds lists, for example {_shown(texts[:1])}")
        lists = [items for items in map(structured, values) if isinstance(items, list) and items]
        single = [items[0] for items in lists if len(items) == 1 and isinstance(items[0], str)]
        joined = [text for text in single if re.search(r",\s|\s\S+\s", text.strip())]
        if len(joined) > _REFUSED * max(1, len(lists)):
            found.problems.append(
                f"{name} holds lists of one text each, which seems to be several tags, for example {_shown(joined)}: "
                "write one tag for each item, or the text without the list"
            )
        if scored := next((value for value in values if has_scores(value)), None):
            found.lines.append(
                f"{name}: scores of a tagger; tags below {LEAST_SCORE} are left out, for example {_shown([scored])}"
            )


def _check_numbers(site: ModuleType, rows: Sequence[Row], found: _Findings) -> None:
    """Reports votes, views, favourites and links to posts that cannot be read."""
    for names, parse in ((site.COUNT_COLUMNS, parse_count), (site.LINK_COLUMNS, parse_id)):
        for name in names:
            values = [row[name] for row in rows if not is_missing(row.get(name))]
            unread = [value for value in values if parse(value) is None]
            if unread and len(unread) >= _REPORTED * len(values):
                found.lines.append(
                    f"{name}: {UNCERTAIN}: {len(unread) / len(values):.0%} are no number that can be read, for example "
                    f"{_shown(unread)}; such rows have none. Another column can be named with --map COLUMN={name}"
                )


def _letter(value: Any) -> str:
    return re.sub(r"^rating\W", "", parse_code(value))


def _readable(row: Row, reading: Reading) -> dict[str, Any]:
    try:
        return reading.row(row)
    except UnreadableField:
        return dict(row)


def _check_rows(
    site: ModuleType, rows: Sequence[Row], reading: Reading, admit: Collection[str], found: _Findings
) -> None:
    """Reads the samples as an ingest would, and reports what it does not understand."""
    unread, no_id, rejected = list[str](), list[str](), Counter[str]()
    dates, unknown_dates, keys, untagged, pages = 0, list[Any](), Counter[str](), 0, list[int | None]()
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
        if isinstance(outcome, Post):
            keys[outcome.id] += 1
            untagged += not any(names for category, names in outcome.tags.items() if category != "artist")
            pages.append(site.named_page(read))
        elif outcome.reason == "unknown rating":
            rejected[outcome.detail] += 1
    count = max(1, len(rows))
    if unread:
        text = f"{len(unread) / count:.0%} of {count} samples are not understood: {_listed(unread)}"
        if len(unread) > _REFUSED * count:
            found.problems.append(
                f"{text}. Write the column as text or numbers that the README of pipeline/sources lists, or read the "
                "field from another column with --map COLUMN=FIELD"
            )
        else:
            found.lines.append(f"{UNCERTAIN}: {text}; such rows are rejected")
    if no_id:
        text = f"{len(no_id) / count:.0%} have none that can be read: {_listed(no_id)}"
        if len(no_id) == len(rows):
            found.problems.append(f"id: {text}. Name the column that holds it with --map COLUMN=id")
        elif len(no_id) >= _REPORTED * count:
            found.lines.append(
                f"id: {UNCERTAIN}: {text}; such rows are rejected. Another column can be named with --map COLUMN=id"
            )
    if rejected:
        text = f"unknown in {rejected.total() / count:.0%}: {_listed(rejected)}"
        if rejected.total() == len(rows) and "unknown rating" not in admit:
            found.problems.append(
                f"rating: {text}. Name the column that holds it with --map COLUMN={site.RATING_COLUMNS[0]}, or give "
                "--admit 'unknown rating' to keep such rows without a rating"
            )
        found.lines.append(
            f"rating: {UNCERTAIN}: {text}; such rows are rejected, or kept without a rating with --admit "
            "'unknown rating'"
        )
    if dates and len(unknown_dates) >= _REPORTED * dates:
        found.lines.append(
            f"{' or '.join(site.DATE_COLUMNS)}: {UNCERTAIN}: {len(unknown_dates) / dates:.0%} of the dates cannot be "
            f"read, for example {_shown(unknown_dates)}; such rows get no era. Another column can be named with --map "
            f"COLUMN={site.DATE_COLUMNS[0]}"
        )
    has_tags = any(name in row for row in rows for name in site.TAG_COLUMNS)  # metadata may have none
    if has_tags and untagged > _REFUSED * keys.total():
        found.lines.append(
            f"tags: {UNCERTAIN}: {untagged / keys.total():.0%} of the samples have none. If another column holds them: "
            f"--map COLUMN={site.TAG_COLUMNS[-1]}"
        )
    repeated = keys.total() - len(keys)
    if repeated >= max(1, _REPORTED * count):
        hint = ". If a column holds the page: --map COLUMN=page" if "page" in site.FIELDS else ""
        found.lines.append(
            f"id: {UNCERTAIN}: {repeated / count:.0%} of the samples repeat an id, for example "
            f"{keys.most_common(1)[0][0]}; one row of each is kept{hint}"
        )
    numbers = [page for page in pages if page is not None]
    if numbers and min(numbers) > 0:
        found.lines.append(
            f"page: {UNCERTAIN}: the lowest of the samples is {min(numbers)}, but the first page of a work is 0, as in "
            "12345678_p0.png"
        )


def _listed(texts: Collection[str]) -> str:
    return "; ".join(list(dict.fromkeys(texts))[:_SHOWN])


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(repr(value)[:60] for value in list(dict.fromkeys(map(str, values)))[:_SHOWN])
