"""The last steps of a layer, so that their tokens can be taken back.

A step destroys two things: the key and value of the token that it evicts and, if the
policy has memory, the scores before it. Both are kept here for the last few steps.
Shapes: entries [B, n_kv_heads, 1, head_dim]; H' is 1 (granularity "layer") or
n_kv_heads ("head").
"""

from typing import NamedTuple

import mlx.core as mx

from .entries import Entries, arrays_of


class Evicted(NamedTuple):
    """A token that was evicted after the token at position `step` had attended.

    keys, values: entries; positions: int32 [B, H', 1]; value_norms: [B, n_kv_heads, 1]
    or None; rotary, stored_rotary: int32 [B, H', 1], or None if nothing is renumbered.
    """

    step: int
    keys: Entries
    values: Entries
    positions: mx.array
    value_norms: mx.array | None
    rotary: mx.array | None = None
    stored_rotary: mx.array | None = None


class Renumbered(NamedTuple):
    """Rotary positions before they were renumbered, when `step` had attended.

    positions, rotary: int32 [B, H', n], of those held then, in order of position;
    shift: how far rotary positions were behind.
    """

    step: int
    shift: int
    positions: mx.array
    rotary: mx.array


class ScoresBefore(NamedTuple):
    """Scores before the token at position `step` came, float32 [B, H', n].

    In order of position, or, if there is a victim's slot, in that of the slots: then
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
    evicted: tuple[Evicted, ...] = ()
    scores: tuple[ScoresBefore, ...] = ()
    renumbered: tuple[Renumbered, ...] = ()

    @property
    def arrays(self) -> list[mx.array]:
        parts = [part for e in (*self.evicted, *self.scores) for part in e[1:]]
        parts += [part for r in self.renumbered for part in (r.positions, r.rotary)]
        return [a for part in parts for a in arrays_of(part)]

    def empty(self) -> "Journal":
        """Return a journal of the same length that holds nothing."""
        return Journal(self.length)

    def with_evicted(self, *evicted: Evicted) -> "Journal":
        """Add tokens evicted at the next steps, as many as there is room for."""
        return self._replace(evicted=self._newest((*self.evicted, *evicted)))

    def with_scores(self, *scores: ScoresBefore) -> "Journal":
        """Add the scores before the next steps, as many as there is room for."""
        return self._replace(scores=self._newest((*self.scores, *scores)))

    def with_renumbered(self, before: Renumbered) -> "Journal":
        """Add rotary positions, and drop those that nobody can go back to."""
        if not self.length:
            return self
        late = [r for r in self.renumbered if r.step > before.step - self.length]
        return self._replace(renumbered=(*late, before))

    def until(self, step: int) -> "Journal":
        """Drop the steps from `step` on: their tokens were taken back."""
        return self._replace(
            evicted=tuple(e for e in self.evicted if e.step < step),
            scores=tuple(s for s in self.scores if s.step < step),
            renumbered=tuple(r for r in self.renumbered if r.step < step),
        )

    def evicted_since(self, step: int) -> list[Evicted]:
        """Return the tokens evicted at `step` or later."""
        return [e for e in self.evicted if e.step >= step]

    def renumbered_since(self, step: int) -> Renumbered | None:
        """Return the first renumbering at `step` or later."""
        return next((r for r in self.renumbered if r.step >= step), None)

    def scores_before(self, step: int) -> ScoresBefore | None:
        return next((s for s in self.scores if s.step == step), None)

    def _newest(self, parts: tuple) -> tuple:
        return parts[-self.length :] if self.length else ()
