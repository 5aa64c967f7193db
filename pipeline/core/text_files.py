"""Text files that people write: rules, lists, prompts, passwords."""

import unicodedata
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark, with \\n between lines, in Unicode's composed form (NFC).

    Editors on Windows write the mark and \\r\\n, file systems and input methods on macOS the decomposed form, in which
    "é" is two characters and no tag or word is found. Raises OSError or UnicodeDecodeError.
    """
    return unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))
