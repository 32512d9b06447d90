"""What a chunk's queries read of the rows that were brought back.

Both parts of an attention, over the slots and over what came back, are softmaxes of
their own. What came back gets the share that it has in a softmax over the slots and all
archived rows, as in the full cache; the slots get the rest. A softmax over both parts
alone would give it more: the few best of thousands would stand for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..storage.recall import Windows


class Recalled(NamedTuple):
    """Output [B, n_heads, L, D] over what came back.

    lse, total: logsumexp of its logits, and of those of all archived rows, [B, n_heads,
    L, 1].
    """

    output: mx.array
    lse: mx.array
    total: mx.array

    def cut(self, start: int, stop: int) -> Recalled:
        """Return that of queries start to stop."""
        return Recalled(*(a[:, :, start:stop] for a in self))

    def merged(self, output: mx.array, lse: mx.array) -> mx.array:
        """Return the attention over both, given that over the slots alone."""
        share = mx.exp(self.lse - mx.logaddexp(self.total, lse))
        return (output * (1 - share) + self.output * share).astype(output.dtype)


def attend_to_windows(queries: mx.array, windows: Windows) -> Recalled:
    """Attend to the window of each query.

    queries: [B, n_heads, L, head_dim], scaled.
    """
    batch, n_heads, length, width = queries.shape
    keys, values, positions = windows.rows.plain
    heads = keys.shape[1]
    asked = queries.astype(mx.float32)
    # [B, n_kv_heads, L, G, D] by [B, n_kv_heads, L, m, D]
    asked = asked.reshape(batch, heads, -1, length, width).swapaxes(2, 3)
    shape = (batch, heads, length, windows.slots)
    keys = keys.astype(mx.float32).reshape(*shape, -1)
    values = values.astype(mx.float32).reshape(*shape, -1)
    there = positions.reshape(*shape)[..., None, :] >= 0
    logits = mx.where(there, asked @ keys.swapaxes(3, 4), -mx.inf)
    lse = mx.logsumexp(logits, axis=-1, keepdims=True)
    # A window without rows has no weight.
    weights = mx.exp(logits - mx.where(lse == -mx.inf, 0, lse))
    output, lse = (
        a.swapaxes(2, 3).reshape(batch, n_heads, length, -1)
        for a in (weights @ values, lse)
    )
    return Recalled(output, lse, windows.total)
