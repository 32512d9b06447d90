"""Logits, in float32 whatever the model's type."""

import mlx.core as mx

from .packed import Rows, product


def masked_logits(
    queries: mx.array, keys: Rows, scale: float, mask: mx.array | str | None
) -> mx.array:
    """q·kᵀ·scale + mask, float32 [B, n_heads, L, S], -inf where a mask hides.

    queries: [B, n_heads, L, head_dim]; keys: [B, n_kv_heads, S, head_dim]; mask: bool
    or additive, broadcast to the result; anything that is no array hides nothing.
    """
    batch, n_heads, length, head_dim = queries.shape
    n_kv_heads, columns = keys.shape[1:3]
    # A group's rows share one matrix product with their KV head.
    grouped = (batch, n_kv_heads, n_heads // n_kv_heads * length, head_dim)
    scaled = queries.astype(mx.float32).reshape(grouped) * scale
    logits = product(scaled, keys, transpose=True)
    logits = logits.reshape(batch, n_heads, length, columns)
    if not isinstance(mask, mx.array):
        return logits
    if mask.dtype == mx.bool_:
        return mx.where(mask, logits, -mx.inf)
    return logits + mask.astype(mx.float32)
