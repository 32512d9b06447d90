"""The last steps of a layer, so that their tokens can be taken back.

A step destroys two things: the row of the token that it evicts and, if the policy has
memory, the scores before it. Both are kept here for the last few steps. Shapes: rows
[B, n_kv_heads, 1, head_dim]; H' is 1 (granularity "layer") or n_kv_heads ("head").
"""

from collections import deque
from typing import NamedTuple

import mlx.core as mx

from .packed import Rows, arrays


class Gone(NamedTuple):
    """A token that left after the token at position `step` had attended.

    keys, values: rows; positions: int32 [B, H', 1]; norms: [B, n_kv_heads, 1] or None.
    """

    step: int
    keys: Rows
    values: Rows
    positions: mx.array
    norms: mx.array | None


class Scores(NamedTuple):
    """Scores before the token at position `step` came, float32 [B, H', n].

    In order of position, or, if there is a dead slot, in that of the slots: then
    positions, int32 [B, H', n], and victim, uint32 [B, H', 1], say which is which.
    """

    step: int
    scores: mx.array
    positions: mx.array | None = None
    victim: mx.array | None = None


class Journal:
    """What the last `length` steps destroyed; 0 keeps nothing."""

    def __init__(self, length: int):
        self.length = length
        self.gone: deque[Gone] = deque(maxlen=length)
        self.scores: deque[Scores] = deque(maxlen=length)

    @property
    def arrays(self) -> list[mx.array]:
        entries = [rows for e in (*self.gone, *self.scores) for rows in e[1:]]
        return [a for rows in entries for a in arrays(rows)]

    def clear(self) -> None:
        self.gone.clear()
        self.scores.clear()

    def forget_from(self, step: int) -> None:
        """Drop the steps from `step` on: their tokens were taken back."""
        for entries in (self.gone, self.scores):
            while entries and entries[-1].step >= step:
                entries.pop()

    def scores_before(self, step: int) -> Scores | None:
        return next((s for s in self.scores if s.step == step), None)
