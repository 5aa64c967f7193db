"""Text files read the same from every editor and operating system."""

from pathlib import Path

import pytest

from pipeline.core.text_files import read_text
from pipeline.curation.stage_rules import RULES, override, with_lists
from pipeline.sources.tag_lists import tag_names

DECOMPOSED = "Poke\N{COMBINING ACUTE ACCENT}mon"


@pytest.mark.parametrize("written", [b"\xef\xbb\xbfa\r\nb\r\n", b"a\nb\n", b"a\rb\r"])
def test_marks_and_line_ends_do_not_matter(written: bytes, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(written)
    assert read_text(tmp_path / "list.txt") == "a\nb\n"


def test_decomposed_letters_are_composed(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(DECOMPOSED, encoding="utf-8")
    assert read_text(tmp_path / "list.txt") == "Pok\N{LATIN SMALL LETTER E WITH ACUTE}mon" == tag_names([DECOMPOSED])[0]


def test_rules_and_their_lists_may_come_from_windows(tmp_path: Path) -> None:
    (tmp_path / "artists.txt").write_bytes(b"\xef\xbb\xbfsome_one\r\n# a comment\r\nother\r\n")
    (tmp_path / "rules.toml").write_bytes(b'\xef\xbb\xbfmin_side = 300\r\nartists_file = "artists.txt"\r\n')
    rules = with_lists(override(RULES["512"], tmp_path / "rules.toml"))
    assert rules.min_side == 300
    assert rules.artists == ("some_one", "other")
