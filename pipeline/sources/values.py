"""Parsers of numbers, ids, flags and codes, which the sites and their public dumps write in several forms."""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

# Whole numbers. A fraction of zeros is what pandas writes for integer columns with nulls.
_ID: Final = re.compile(r"\d+(\.0*)?", re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_GROUPED: Final = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", re.ASCII)  # 1,234,567
_EXACT: Final = 2**53  # from here on floats skip whole numbers
_TRUE: Final = frozenset({"true", "t", "yes", "y"})
_FALSE: Final = frozenset({"false", "f", "no", "n"})
_MISSING: Final = frozenset({"", "nan", "none", "null", "<na>", "nat"})


class UnreadableField(Exception):
    """A value of a field that is not understood. The message says which, and what it is."""


def first(row: Mapping[str, Any], *names: str) -> Any:
    """Value of the first of these fields that is not missing, or None."""
    return next((row[name] for name in names if not is_missing(row.get(name))), None)


def is_missing(value: Any) -> bool:
    """True for null, NaN and the texts that stand for them."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def parse_int(value: Any) -> int | None:
    """Integer from a number or its text, or None. Fractions are cut off."""
    if isinstance(value, str):
        text = value.strip()
        if _GROUPED.fullmatch(text):
            text = text.replace(",", "")
        if not _NUMBER.fullmatch(text):
            return None
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def parse_id(value: Any) -> int | None:
    """Id in [0, 2^63), or None. Only whole numbers and their digits are ids: no sign, exponent or underscore, and no
    float beyond 2^53, which may have been rounded."""
    if isinstance(value, str):
        found = int(value.strip().partition(".")[0]) if _ID.fullmatch(value.strip()) else None
    elif isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, float | Decimal) and value == value and value == value // 1:
        found = None if isinstance(value, float) and value > _EXACT else int(value)
    else:
        found = None
    return found if found is not None and 0 <= found < 2**63 else None


def parse_count(value: Any) -> int | None:
    """Number of votes, views or favourites, clamped to 32 bits; None if unreadable."""
    found = parse_int(value)
    return None if found is None else max(-(2**31), min(2**31 - 1, found))


def parse_code(value: Any) -> str:
    """An enumeration value as lower-case text ("1" for 1, 1.0, "1.0" and [1]), or "" if it is missing."""
    if isinstance(value, list) and len(value) <= 1:  # as some libraries write a single label
        value = value[0] if value else None
    found = None if isinstance(value, bool) else parse_int(value)
    if found is not None:
        return str(found)
    return "" if is_missing(value) else str(value).strip().lower()


def parse_flag(row: Mapping[str, Any], name: str) -> bool | None:
    """The flag of a row from a bool, a number or text; None if it is missing. Raises UnreadableField for others."""
    value = row.get(name)
    if is_missing(value):
        return None
    if isinstance(value, str):
        text = value.strip().lower()
        number = parse_int(text)
        if number is None and text not in _TRUE | _FALSE:
            raise UnreadableField(f"{name} is {value!r}, neither true nor false")
        return text in _TRUE if number is None else number != 0
    if not isinstance(value, int | float | Decimal):
        raise UnreadableField(f"{name} is {value!r}, neither true nor false")
    return bool(value)
