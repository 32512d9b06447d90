"""Where the sentences of an English text end: full stops, and what they do not end.

Plain rules. Punkt (Kiss and Strunk 2006), untrained and told the same abbreviations,
also ends one at every "!" and "?" before a small letter, as in '"Why?" he said'.
"""

import re

# After a full stop and closing marks, before what a sentence can begin with.
_END = re.compile(r"(?<=[.!?])[\"'”’)]*(?=\s+[\"'“‘(]*[A-Z])")
_NO_END = re.compile(
    r"\b(Mrs?|Messrs|Dr|St|Esq|Capt|Col|Gen|Lieut|Prof|Rev|Hon|No|Vol|[A-Z])\.$"
)


def sentence_ends(text: str) -> list[int]:
    """Find the characters after which a sentence ends; not the end of the text."""
    ends = (match.end() for match in _END.finditer(text))
    return [end for end in ends if not _NO_END.search(text[max(0, end - 9) : end])]


def sentences(text: str) -> list[str]:
    """Join a text's lines to paragraphs, and cut it where its sentences end."""
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    text = "\n\n".join(p for p in paragraphs if p)
    cuts = sentence_ends(text)
    pairs = zip([0, *cuts], [*cuts, len(text)], strict=True)
    return [text[a:b] for a, b in pairs if b > a]
