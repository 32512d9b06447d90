"""The kind of each token: punctuation, number, proper noun, possessive, and so on.

A plain rule-based tagger for English, no parser. It reads the decoded text and gives
every character a kind; a token has that of its first letter or digit, so the parts of a
word all have the word's kind. What the rules are:

- possessive: 's after a word, unless after "it", "that" and the like, where it is "is";
  an apostrophe after an s and before a word in small letters.
- number: digits, with what joins them (1,000 or 3.5). Number words are other words.
- function word: a closed list, and contractions like "don't" and "we'll".
- proper noun: a word with a capital that is written with one within sentences more
  often than without in this text. So a name met at the beginning of sentences only is
  another word, and a title ("Sir") or month (not May) is a proper noun.
- punctuation: everything else that is seen, symbols included. whitespace: the rest.
- special: tokens that are no text, like the one at the beginning.
"""

import re
from collections import Counter
from typing import Any

from .sentences import sentence_ends

KINDS = (
    "punctuation",
    "number",
    "proper noun",
    "possessive",
    "function word",
    "other word",
    "whitespace",
    "special",
)
# The mean of a kind with fewer tokens says little.
ENOUGH = 10

_PARTS = re.compile(
    r"""
    (?P<possessive> (?<=[^\W_])['’][sS](?![^\W_]) | (?<=s)['’](?=\s+[a-z]) )
    | (?P<number> \d+ (?:[.,]\d+)* (?:(?:st|nd|rd|th)(?![^\W_]))? )
    | (?P<word> [^\W\d_]+ (?:['’](?![sS](?![^\W_]))[^\W\d_]+)* )
    | (?P<whitespace> \s+ )
    | (?P<punctuation> . )
    """,
    re.VERBOSE | re.DOTALL,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What "is" is shortened after.
_BEFORE_IS = _words("it he she that this there here what who where when how why let")
_FUNCTION = _words(
    """
    a an the this that these those each every either neither some any no all both few
    many much more most other another such same own
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he
    him his himself she her hers herself it its itself they them their theirs themselves
    thou thee thy thine ye who whom whose which what whoever whatever one none nothing
    something anything everything nobody somebody anybody everybody
    and or but nor so yet for if because although though unless until till while whereas
    whether than as since when where why how whenever wherever
    of in to on at by from with without within into onto upon about above below under
    over between among against during before after through across along around behind
    beside besides beyond near off out up down toward towards throughout per via
    be am is are was were been being have has had having do does did doing done shall
    will would should can could may might must ought need dare used
    not never too very also only just even still there here then now thus hence again
    """
)
# Titles, which are proper nouns wherever they stand.
_TITLES = _words("mr mrs ms dr st rev esq col capt gen lt prof messrs")
_OPENING_QUOTES = '"“‘'
_EMPTY_LINE = re.compile(r"\n\s*\n")
# The most tokens that a character is ever cut into.
_LONGEST = 4


def token_kinds(tokenizer: Any, ids: list[int]) -> list[str]:
    """The kind, one of `KINDS`, of each token of a text."""
    text, spans = decode(tokenizer, ids)
    kinds = tag(text)
    special = set(tokenizer.all_special_ids)
    return [
        "special" if token in special else _of_span(text, kinds, start, stop)
        for token, (start, stop) in zip(ids, spans, strict=True)
    ]


def decode(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of tokens, and where in it each one is: characters, start and stop.

    Tokens that are a character together share its place; special ones have none.
    """
    special = set(tokenizer.all_special_ids)
    text, spans = "", []
    before: list[int] = []
    group: list[int] = []
    # Tokens that wait for one character to be complete, after so many that are.
    waiting = complete = 0

    def decoded(some: list[int]) -> str:
        return tokenizer.decode(some, clean_up_tokenization_spaces=False)

    for i, token in enumerate(ids):
        if token in special:
            spans.append((len(text), len(text)))
            before = []
            continue
        group.append(token)
        # After its neighbour: some tokenizers drop the space of the first one.
        piece = decoded(before + group)[len(decoded(before)) if before else 0 :]
        whole = len(piece.rstrip("\ufffd"))
        waiting = 1 if whole > complete else waiting + 1
        complete = whole
        unfinished = piece.endswith("\ufffd") and waiting < _LONGEST
        if unfinished and i + 1 < len(ids) and ids[i + 1] not in special:
            continue
        spans += [(len(text), len(text) + len(piece))] * len(group)
        text += piece
        before, group = group, []
        waiting = complete = 0
    return text, spans


def tag(text: str) -> list[str]:
    """The kind of each character of a text."""
    names = _names(text) | _TITLES
    kinds, word = [], ""
    for match in _PARTS.finditer(text):
        kind, part = match.lastgroup or "", match.group()
        if kind == "word":
            word = _plain(part)
            kind = "other word"
            if _is_function(word):
                kind = "function word"
            elif part[0].isupper() and word in names:
                kind = "proper noun"
        elif kind == "possessive" and len(part) > 1 and word in _BEFORE_IS:
            kind = "function word"
        kinds += [kind] * len(part)
    return kinds


def _of_span(text: str, kinds: list[str], start: int, stop: int) -> str:
    places = range(start, stop)
    alphanumeric = (i for i in places if text[i].isalnum())
    seen = (i for i in places if not text[i].isspace())
    first = next(alphanumeric, next(seen, None))
    return "whitespace" if first is None else kinds[first]


def _names(text: str) -> set[str]:
    """Words that are written with a capital within sentences, and mostly so."""
    capital: Counter[str] = Counter()
    small: Counter[str] = Counter()
    paragraphs = [match.end() for match in _EMPTY_LINE.finditer(text)]
    starts = sorted([0, *sentence_ends(text), *paragraphs], reverse=True)
    begins = False
    for match in _PARTS.finditer(text):
        while starts and starts[-1] <= match.start():
            starts.pop()
            begins = True
        part = match.group()
        begins = begins or part in _OPENING_QUOTES
        if match.lastgroup == "word":
            word = _plain(part)
            if not part[0].isupper():
                small[word] += 1
            elif not begins:
                capital[word] += 1
            begins = False
    return {w for w, n in capital.items() if n > small[w] and not _is_function(w)}


def _is_function(word: str) -> bool:
    """Whether a word in plain letters is a function word."""
    return word.endswith("n't") or word.partition("'")[0] in _FUNCTION


def _plain(word: str) -> str:
    return word.lower().replace("’", "'")
