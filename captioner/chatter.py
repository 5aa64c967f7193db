"""What a model says to its user, or about its task, instead of describing the picture.

Writing in the picture may say anything: text in quotation marks is not looked at.
"""

import re
from typing import Final

from captioner.words import QUOTED

_NAMES: Final = "think|thinking|thought|reasoning|reflection|scratchpad"
_THINKING: Final = re.compile(rf"\s*(?:<({_NAMES})>.*?</\1>|◁think▷.*?◁/think▷)\s*", re.IGNORECASE | re.DOTALL)
# A sentence begins with the text, after the end of another, a line break or a bracket.
_START: Final = r"(?:^|[.!?…:)\]]\s+|\n\s*|[(\[*]\s*)"
_FILLERS: Final = (
    r"(?:(?:ok(?:ay)?|so|first(?:ly)?|now|next|then|well|hmm+|wait|alright|and|but|also|yes|no|however)[,.!]?\s+)*"
)
_SENTENCES: Final = (
    # The model speaks of itself.
    r"i(?:['\u2019](?:m|ll|ve|d))?\s+(?!(?:love|heart|ching|beam)\b)",
    r"(?:as|being)\s+an?\s+(?:ai|artificial\s+intelligence|language\s+model|assistant)\b(?!\s+(?:robot|girl|android))",
    r"(?:let\s+me|let['\u2019]s|we\s+(?:need|should|must|have\s+to|are\s+(?:given|asked)))\b",
    r"(?:my|our)\s+(?:caption|description|answer|response|task|apologies)\b",
    r"(?:sorry|apologies|unfortunately|regrettably)\b",
    # It speaks to its user.
    r"(?:would|do|could|can|should|may)\s+(?:you|i)\b",
    r"(?:please|feel\s+free|let\s+me\s+know|hope\s+(?:this|that|it)|enjoy!|happy\s+to)\b",
    r"(?:if\s+(?:you(?:['\u2019]d)?\s+(?:would|want|wish|need|have|like|prefer|provide|could|can\s+(?:provide|share))|there['\u2019]s|anything)"
    r"|is\s+there\s+anything|in\s+case\s+you|should\s+you)\b",
    r"(?:as\s+(?:you\s+)?(?:requested|instructed|asked)|per\s+your|you\s+(?:can\s+(?:also|use|adjust|change|modify|choose|ask)|may\s+(?:also|use|want)|asked|provided|requested|want))\b",
    r"(?:sure|certainly|of\s+course|absolutely|great\s+question|no\s+problem|got\s+it|understood)\b",
    r"here(?:['\u2019]s|\s+is|\s+are)\s+(?:the|an?|your|my|some|another|two|three|\d)\b[^.]{0,60}"
    r"\b(?:captions?|descriptions?|summar(?:y|ies)|versions?|options?|sentences?|alternatives?)\b",
    # It offers several answers, or comments on one.
    r"(?:(?:option|version|caption|alternative|attempt|description|answer|response|draft|variant)\s*(?:\#?\d+|[a-c]|one|two)\b"
    r"|(?:alternatively|alternative\s+(?:caption|version|description)s?|another\s+(?:option|version|caption|description)"
    r"|or\s+(?:more\s+(?:briefly|concisely)|alternatively)|(?:shorter|longer|short|long)\s+(?:version|caption)"
    r"|(?:revised|final|improved|corrected)\s+(?:caption|answer|description|version))\b)",
    r"(?:note|n\.b|nb|disclaimer|edit|ps|p\.s|remark|explanation|reasoning|analysis|thoughts?|output|summary|word\s+count"
    r"|keywords?|tags?|character\s+count)(?:\.|\s+that\b|\s*[:\u2014]|\s+[-\u2013])",
    r"(?:this|the)\s+(?:caption|description|response|answer)\s+(?:is|was|does|follows|describes|captures|avoids|includes"
    r"|uses|has|focuses|should|would|may)\b",
    # It could not see the picture.
    r"no\s+(?:image|picture|photo|file)\s+(?:was|is|has|were|could|can|appears|available|provided|attached|found)\b",
    r"(?:there\s+(?:is|was|seems\s+to\s+be)\s+)no\s+(?:image|picture|file|visible\s+(?:image|content))\b",
    r"(?:(?:this|the|your)\s+)?(?:image|picture|file|link|url|attachment|upload)\s+(?:you\s+\w+\s+)?(?:could|can|did|does|was|is|has|failed"
    r"|appears|seems|cannot|didn['\u2019]t|isn['\u2019]t|couldn['\u2019]t)\s*(?:to\s+be\s+|been\s+|be\s+|not\s+)*"
    r"(?:load|display|render|open|access|process|view|available|provided|attached|visible|broken|corrupt|blank|empty"
    r"|missing|invalid|unavailable|inaccessible|shown|found)",
    r"(?:error|failed|unable|cannot|could\s+not|can['\u2019]t)\b[^.]{0,20}\b(?:load|view|see|process|access|describe|display|open)"
    r"\w*\s+(?:the\s+|this\s+|any\s+|an?\s+)?(?:image|picture|file|url|attachment)\b",
)
_SPEAKS: Final = re.compile(_START + _FILLERS + "(?:" + "|".join(_SENTENCES) + ")", re.IGNORECASE)
# Anywhere: the tags, hints and instructions of the request. Dogs, gifts and clothes have tags, too.
_ABOUT_TASK: Final = re.compile(
    r"""\b(?:(?:provided|given|supplied|listed|following|input|hinted|booru|danbooru)\s+(?:tags?|hints?|keywords?|labels?)
    |(?:tags?|hints?|keywords?)\s+(?:provided|given|supplied|listed|mention(?:s|ed)?|suggest(?:s|ed)?|indicate[sd]?
        |specif(?:y|ies|ied)|state[sd]?|impl(?:y|ies|ied)|describe[sd]?)
    |(?:based\s+on|according\s+to|as\s+per|per|from|in|match(?:es|ing)?|with|contradicts?|by)\s+the\s+(?:\w+\s+)?(?:tags|hints|keywords|prompt
        |instructions|guidelines|request)
    |the\s+(?:user|prompt|instructions?|guidelines)\b(?=\s+(?:says?|asks?|wants?|requests?|requires?|specif|mention|states?))
    |(?:not\s+(?:mentioned|listed|included)\s+in)\s+the\s+(?:tags|hints))""",
    re.IGNORECASE | re.VERBOSE,
)
_LIST: Final = re.compile(r"(?:^|\s)(?:1[.)]\s+\S.{10,}?\s2[.)]\s+\S|[-•]\s+\S.{5,}?\n\s*[-•]\s+\S)", re.DOTALL)


def without_thinking(text: str) -> str:
    """The text without closed passages of thinking. An open one has a special token left."""
    return _THINKING.sub(" ", text).strip()


def has_chatter(text: str) -> bool:
    """True if a sentence of the text is not about the picture."""
    plain = QUOTED.sub(" ", text)
    return bool(_SPEAKS.search(plain) or _ABOUT_TASK.search(plain) or _LIST.search(plain))
