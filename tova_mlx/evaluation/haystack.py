"""Facts hidden in a real text, and the prompts that ask for them."""

import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..errors import EvaluationError
from .asking import asked
from .sentences import sentences

_PROMPT = "Read this text. A question about it follows.\n\n{}\n\nQuestion: {}"
_CITIES = "Lisbon Geneva Nairobi Havana Oslo Kyoto Quito Dublin Cairo Prague Lima Perth"
_ACTIVITIES = (
    "feed the parrots, paint a wooden boat, drink plum tea, count the red balloons, "
    "fly a paper dragon, borrow a yellow bicycle, taste frozen honey, race the blind "
    "snails, listen to the brass clocks, juggle seven lemons"
)
_PLACES = (
    "beside the old mill, under the glass bridge, behind the cheese museum, on the "
    "floating market, in the copper lighthouse, above the tram station, near the "
    "sleeping volcano, inside the velvet theatre"
)
_SMALL_WORDS = "a the to beside under behind on in above near inside"


class Fact(NamedTuple):
    """Opening and answer are what is hidden; the question asks for the answer."""

    question: str
    opening: str
    answer: str

    @property
    def needle(self) -> str:
        return f"{self.opening} {self.answer}."

    def is_hit(self, said: str) -> bool:
        """Whether an answer has all words of the right one but the small ones."""
        return _words(self.answer) <= _words(said)


def _words(text: str) -> set[str]:
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower())
    return set(re.findall(r"\d+|[^\W\d]+", text)) - set(_SMALL_WORDS.split())


def _digits(rng: random.Random) -> Fact:
    number = str(rng.randrange(10_000, 100_000))
    return Fact("What is the secret number?", "The secret number is", number)


def _sentence(rng: random.Random) -> Fact:
    best = f"the best thing to do in {rng.choice(_CITIES.split())}"
    activity, place = (rng.choice(x.split(", ")) for x in (_ACTIVITIES, _PLACES))
    return Fact(f"What is {best}?", f"T{best[1:]} is to", f"{activity} {place}")


KINDS: dict[str, Callable[[random.Random], Fact]] = {
    "digits": _digits,
    "sentence": _sentence,
}


class Haystack:
    """Sentences of a text, and how many tokens they have with a tokenizer."""

    def __init__(self, text: str, tokenizer: Any):
        self.tokenizer = tokenizer
        self.sentences = sentences(text)
        self._anchor = len(self._encode("."))
        # Tokens before each sentence, and of all.
        self.ends = np.cumsum([0, *map(self.count, self.sentences)])

    def count(self, text: str) -> int:
        """Tokens of a text that follows another."""
        # Some tokenizers begin a text in a way of its own.
        return len(self._encode(f".{text}")) - self._anchor

    def hide(self, needle: str, length: int, depth: float, rng: random.Random) -> str:
        """A drawn part of the text with the needle in it, `length` tokens together.

        It ends where a sentence does and begins where it must, at a word. The needle
        stands at the sentence boundary nearest to `depth`, a share of the part.
        Raises EvaluationError: not enough text, or no room for it.
        """
        size = self.count(f" {needle}")
        if length < 4 * size:
            raise EvaluationError(
                f"--length {length} leaves no room for a text around a fact of {size} "
                f"tokens. Use {8 * size} or more."
            )
        stops = np.flatnonzero(self.ends >= length - size)
        if not len(stops):
            raise EvaluationError(
                f"--text has {self.ends[-1]} tokens, and --length {length} needs "
                f"{length - size} around the fact. Give a longer text, or a smaller "
                "--length."
            )
        stop = rng.choice(stops.tolist())
        begin = self.ends[stop] - (length - size)
        first = int(np.searchsorted(self.ends, begin, side="right"))
        head = self._end_of(self.sentences[first - 1], int(self.ends[first] - begin))
        parts = [head, *self.sentences[first:stop]]
        inside = np.array([0, *(self.ends[first : stop + 1] - begin)])
        at = int(np.abs(inside - depth * inside[-1]).argmin())
        before, after = "".join(parts[:at]).strip(), "".join(parts[at:]).strip()
        return " ".join(part for part in (before, needle, after) if part)

    def _end_of(self, sentence: str, n_tokens: int) -> str:
        """The words at the end of a sentence that are nearest to `n_tokens`."""
        starts = [m.start() for m in re.finditer(r"\s+|^|$", sentence)]
        ends = (sentence[start:] for start in starts)
        return min(ends, key=lambda end: abs(self.count(end) - n_tokens))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


class Cell(NamedTuple):
    """Where cases differ on purpose. length: tokens; depth: a share, 1 is the end."""

    kind: str
    length: int
    depth: float


class Case(NamedTuple):
    """A fact in a text; the tokens of the prompt, and of the right answer after it."""

    fact: Fact
    text: str
    prompt: list[int]
    answer: list[int]


def draw(haystack: Haystack, cell: Cell, n: int, seed: int) -> list[Case]:
    """The cases of a cell; they do not depend on what other cells there are.

    Raises EvaluationError as `Haystack.hide` does.
    """
    cases = []
    for i in range(n):
        rng = random.Random(f"{seed} {cell.kind} {cell.length} {cell.depth:g} {i}")
        fact = KINDS[cell.kind](rng)
        text = haystack.hide(fact.needle, cell.length, cell.depth, rng)
        cases.append(Case(fact, text, *_prompt(haystack.tokenizer, fact, text)))
    return cases


def _prompt(tokenizer: Any, fact: Fact, text: str) -> tuple[list[int], list[int]]:
    """Tokens up to the opening of the answer, and of the answer."""
    opened = asked(tokenizer, _PROMPT.format(text, fact.question)) + fact.opening
    prompt = tokenizer.encode(opened, add_special_tokens=False)
    whole = tokenizer.encode(f"{opened} {fact.answer}", add_special_tokens=False)
    # The last token may grow with what follows it.
    pairs = enumerate(zip(prompt, whole, strict=False))
    n = next((i for i, (a, b) in pairs if a != b), len(prompt))
    return whole[:n], whole[n:]
