"""Numbers, ids and flags in every form that the sites and their dumps write, and what is none."""

from decimal import Decimal

import pytest

from pipeline.sources.values import UnreadableField, is_missing, parse_code, parse_flag, parse_id, parse_int

NAN = float("nan")


@pytest.mark.parametrize("value", [7, 7.0, "7", " 7 ", "7.0", "007", Decimal(7)])
def test_ids_are_whole_numbers_in_any_type(value: object) -> None:
    assert parse_id(value) == 7


@pytest.mark.parametrize(
    "value",
    [-5, "-5", "+5", "1_0", "1e3", 7.5, "7.5", "inf", NAN, None, True, "", "x7", "７", 2**63, "9" * 30, 2.0**60, [7]],
)
def test_what_is_not_the_digits_of_a_whole_number_is_no_id(value: object) -> None:
    assert parse_id(value) is None


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3.7, 3),
        ("-3", -3),
        ("1,234,567", 1234567),
        ("1,23", None),
        ("1e3", 1000),
        ("1_0", None),
        ("x", None),
        (NAN, None),
        (None, None),
    ],
)
def test_numbers(value: object, number: int | None) -> None:
    assert parse_int(value) == number


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", "1.0", "true", "T", " Yes "])
def test_a_set_flag(value: object) -> None:
    assert parse_flag({"flag": value}, "flag") is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "0", "0.0", "False", "f", "no"])
def test_a_flag_that_is_not_set(value: object) -> None:
    assert parse_flag({"flag": value}, "flag") is False


@pytest.mark.parametrize("value", [None, NAN, "", "NaN", "null", "None"])
def test_a_missing_flag_is_neither(value: object) -> None:
    assert is_missing(value)
    assert parse_flag({"flag": value}, "flag") is None
    assert parse_flag({}, "flag") is None


@pytest.mark.parametrize("value", ["maybe", [False], {"set": False}])
def test_a_flag_of_another_form_is_not_guessed(value: object) -> None:
    with pytest.raises(UnreadableField, match=r"flag is .*, neither true nor false"):
        parse_flag({"flag": value}, "flag")


@pytest.mark.parametrize(
    ("value", "code"), [(1, "1"), ("1.0", "1"), (["G"], "g"), ([], ""), (True, "true"), (None, ""), (" R-18 ", "r-18")]
)
def test_codes(value: object, code: str) -> None:
    assert parse_code(value) == code
