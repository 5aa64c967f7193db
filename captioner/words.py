"""What counts as a word and as a quotation in a caption."""

import re
from typing import Final

WORD: Final = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
# Writing on a sign or in a speech bubble may be in any language and have any name.
QUOTED: Final = re.compile(
    r"[\"\u201c\u300c][^\"\u201c\u201d\u300c\u300d]{0,200}[\"\u201d\u300d]"
    # Single quotation marks, unless they are the apostrophe of a word.
    r"|(?<!\w)['\u2018](?:[^'\u2018\u2019]|(?<=\w)['\u2019](?=\w)){1,120}['\u2019](?!\w)"
)


def word_set(text: str) -> frozenset[str]:
    """The set of the words in `text`, for tables written as text."""
    return frozenset(text.split())
