"""What counts as a word and as a quotation in a caption."""

import re
from typing import Final

WORD: Final = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
# What is written on a sign or said in a speech bubble is anyone's language and anyone's name.
QUOTED: Final = re.compile(
    r"[\"\u201c\u300c][^\"\u201c\u201d\u300c\u300d]{0,200}[\"\u201d\u300d]"
    # Single ones, which are not the apostrophe of a word.
    r"|(?<!\w)['\u2018](?:[^'\u2018\u2019]|(?<=\w)['\u2019](?=\w)){1,120}['\u2019](?!\w)"
)


def word_set(text: str) -> frozenset[str]:
    """The words of a table that is written as a text."""
    return frozenset(text.split())
