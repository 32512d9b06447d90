"""What a chunk's queries read of the rows that were brought back.

Both parts of an attention, over the slots and over the recall window, are softmaxes of
their own; weighed by the sums of their exponentials they are the softmax over both.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..storage.recall import REFILL, Windows


class Recalled(NamedTuple):
    """Output [B, n_heads, L, D] over the windows; its logsumexp [B, n_heads, L, 1]."""

    output: mx.array
    lse: mx.array

    def cut(self, start: int, stop: int) -> Recalled:
        """Return that of queries start to stop."""
        return Recalled(*(a[:, :, start:stop] for a in self))

    def merged(self, output: mx.array, lse: mx.array) -> mx.array:
        """Return the attention over both, given that over the slots alone."""
        share = mx.sigmoid(self.lse - lse)
        return (output * (1 - share) + self.output * share).astype(output.dtype)


def attend_to_windows(queries: mx.array, windows: Windows) -> Recalled:
    """Attend to the window of each query.

    queries: [B, n_heads, L, head_dim], scaled.
    """
    batch, n_heads, length, width = queries.shape
    keys, values, positions = windows.rows.plain
    heads = keys.shape[1]
    n_windows = keys.shape[2] // windows.slots
    before, all_of = windows.first, n_windows * REFILL
    padding = [(0, 0), (0, 0), (before, all_of - before - length), (0, 0)]
    asked = mx.pad(queries.astype(mx.float32), padding)
    # [B, n_kv_heads, W, G * R, D] by [B, n_kv_heads, W, m, D]
    asked = asked.reshape(batch, heads, -1, n_windows, REFILL, width).swapaxes(2, 3)
    asked = asked.reshape(batch, heads, n_windows, -1, width)
    in_windows = (batch, heads, n_windows, windows.slots)
    keys = keys.astype(mx.float32).reshape(*in_windows, -1)
    values = values.astype(mx.float32).reshape(*in_windows, -1)
    there = positions.reshape(*in_windows)[..., None, :] >= 0
    logits = mx.where(there, asked @ keys.swapaxes(3, 4), -mx.inf)
    lse = mx.logsumexp(logits, axis=-1, keepdims=True)
    # A window without rows has no weight.
    weights = mx.exp(logits - mx.where(lse == -mx.inf, 0, lse))
    return Recalled(
        *(
            _by_query(a, n_heads, n_windows)[:, :, before : before + length]
            for a in (weights @ values, lse)
        )
    )


def _by_query(array: mx.array, n_heads: int, n_windows: int) -> mx.array:
    """[B, n_kv_heads, W, G * R, D] as [B, n_heads, W * R, D]."""
    batch, heads, _, _, width = array.shape
    array = array.reshape(batch, heads, n_windows, -1, REFILL, width)
    return array.swapaxes(2, 3).reshape(batch, n_heads, -1, width)
