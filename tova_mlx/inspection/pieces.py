"""The text of tokens, in pieces that can be shown one by one.

A piece is a token, or several that are one character together: a byte-level tokenizer
cuts characters that it met seldom. Joined, the pieces are what the tokenizer decodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.kinds import decode

# Tokens after the last one that may be needed to complete its character.
AHEAD = 8


@dataclass(frozen=True)
class Pieces:
    """What tokens say.

    texts: of each piece, in order; piece_of: of each token, the index of its piece;
    special: the indices of pieces that are no text, such as <|im_start|>.
    """

    texts: tuple[str, ...]
    piece_of: tuple[int, ...]
    special: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, ids: Sequence[int], n: int) -> "Pieces":
        """Those of the first n tokens of ids; the others complete the last one."""
        ids = list(ids[: n + AHEAD])
        text, spans = decode(tokenizer, ids)
        special_ids = set(tokenizer.all_special_ids)
        texts: list[str] = []
        piece_of: list[int] = []
        special: set[int] = set()
        before = None
        for token, span in zip(ids[:n], spans, strict=False):
            start, stop = span
            if span != before or start == stop:
                if token in special_ids:
                    special.add(len(texts))
                    texts.append(tokenizer.decode([token]))
                else:
                    texts.append(text[start:stop])
            piece_of.append(len(texts) - 1)
            before = span
        return cls(tuple(texts), tuple(piece_of), frozenset(special))
