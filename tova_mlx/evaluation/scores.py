"""Scores of what a model wrote, each between 0 and 1, and their means.

Words are compared, not tokens, so that models with other tokenizers compare.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EvaluationError


@cache
def rouge() -> Any:
    """The scorer of `rouge_l`. Raises EvaluationError without rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise EvaluationError(
            'ROUGE needs rouge-score. Run: pip install "tova_mlx[eval]"'
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F with stemming, of the reference that gives most.

    Source: SQuALITY's own scoring (nyu-mll/SQuALITY, multi_rouge.py) does the same
    with the same package. Differs from the source: they print it times 100.
    """
    return float(rouge().score_multi(references, answer)["rougeL"].fmeasure)


def f1(answer: str, references: Sequence[str]) -> float:
    """Share of words in common, of the reference that gives most.

    Lower case, without punctuation and articles. Source: SQuAD (Rajpurkar et al.
    2016), as QASPER and L-Eval use it. Differs from the source: nothing known.
    """
    return max(_f1(_words(answer), _words(reference)) for reference in references)


def repetition(text: str, n: int = 4) -> float:
    """Share of the runs of `n` words that were there before; 0 for a shorter text.

    Source: seq-rep-4 of Welleck et al. 2019, arXiv 1908.04319. Differs from the
    source: words instead of tokens.
    """
    words = text.split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def mean_over(
    values: npt.ArrayLike, sources: Sequence[Hashable]
) -> tuple[float, float | None]:
    """The mean, and its standard error when values of one source go together.

    Questions about one document are easy or hard together, so the deviations of a
    document are summed first. None with fewer than two sources.
    """
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    sums: dict[Hashable, float] = {}
    for source, deviation in zip(sources, values - mean, strict=True):
        sums[source] = sums.get(source, 0.0) + float(deviation)
    n = len(sums)
    if n < 2:
        return mean, None
    square = sum(s * s for s in sums.values()) * n / (n - 1)
    return mean, math.sqrt(square) / len(values)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
