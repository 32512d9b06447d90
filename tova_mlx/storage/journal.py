"""The last steps of a layer, so that their tokens can be taken back.

A step destroys two things: the row of the token that it evicts and, if the policy has
memory, the scores before it. Both are kept here for the last few steps. Shapes: rows
[B, n_kv_heads, 1, head_dim]; H' is 1 (granularity "layer") or n_kv_heads ("head").
"""

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


class Journal(NamedTuple):
    """What the last `length` steps destroyed, oldest first; 0 keeps nothing.

    Never changed in place, so that a cache can go back to one it had before.
    """

    length: int
    gone: tuple[Gone, ...] = ()
    scores: tuple[Scores, ...] = ()

    @property
    def arrays(self) -> list[mx.array]:
        entries = [rows for e in (*self.gone, *self.scores) for rows in e[1:]]
        return [a for rows in entries for a in arrays(rows)]

    def empty(self) -> "Journal":
        """A journal of the same length that holds nothing."""
        return Journal(self.length)

    def with_gone(self, *gone: Gone) -> "Journal":
        """With tokens that left at the next steps, as many as there is room for."""
        return self._replace(gone=self._newest((*self.gone, *gone)))

    def with_scores(self, *scores: Scores) -> "Journal":
        """With the scores before the next steps, as many as there is room for."""
        return self._replace(scores=self._newest((*self.scores, *scores)))

    def until(self, step: int) -> "Journal":
        """Without the steps from `step` on: their tokens were taken back."""
        return self._replace(
            gone=tuple(g for g in self.gone if g.step < step),
            scores=tuple(s for s in self.scores if s.step < step),
        )

    def gone_since(self, step: int) -> list[Gone]:
        """The tokens that left at `step` or later."""
        return [g for g in self.gone if g.step >= step]

    def scores_before(self, step: int) -> Scores | None:
        return next((s for s in self.scores if s.step == step), None)

    def _newest(self, entries: tuple) -> tuple:
        return entries[-self.length :] if self.length else ()
