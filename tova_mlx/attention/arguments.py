"""What a model gives to its attention beside queries, keys and values."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .recalled import Recalled


class AttentionArgs(NamedTuple):
    """Scale of the logits, mask and learned sinks, as mlx-lm's models give them.

    mask: None, "causal", or bool or additive, broadcast to [B, n_heads, L, S]; sinks:
    learned logits [n_heads] in the softmax's denominator, or None; recalled: what the
    queries read beside the keys and values, not the model's doing.
    """

    scale: float
    mask: mx.array | str | None = None
    sinks: mx.array | None = None
    recalled: Recalled | None = None

    @property
    def array_mask(self) -> mx.array | None:
        """The mask if it is an array."""
        return self.mask if isinstance(self.mask, mx.array) else None

    def with_mask(self, mask: mx.array | str | None) -> AttentionArgs:
        return self._replace(mask=mask)

    def cut(self, start: int, stop: int, mask: mx.array | str | None) -> AttentionArgs:
        """Return those of queries start to stop, with their own mask."""
        recalled = self.recalled and self.recalled.cut(start, stop)
        return self._replace(mask=mask, recalled=recalled)
