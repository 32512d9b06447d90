"""Logits, in float32 whatever the model's type."""

import mlx.core as mx

from .packed import Packed, Rows, product


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
    return _hidden(logits, mask)


def _hidden(logits: mx.array, mask: mx.array | str | None) -> mx.array:
    if not isinstance(mask, mx.array):
        return logits
    if mask.dtype == mx.bool_:
        return mx.where(mask, logits, mx.array(-mx.inf, logits.dtype))
    return logits.astype(mx.float32) + mask.astype(mx.float32)


def newest_logits(
    queries: mx.array, keys: Rows, scale: float, mask: mx.array | str | None
) -> mx.array:
    """`masked_logits` of one row a query, for the device that has the keys.

    In the keys' own type, unless quantised or masked: to have them in float32 would be
    a copy of all keys. What is lost is the logits' last bits; products add up in
    float32.
    """
    if isinstance(keys, Packed):
        return masked_logits(queries, keys, scale, mask)
    batch, n_heads, length, head_dim = queries.shape
    n_kv_heads, columns = keys.shape[1:3]
    grouped = (batch, n_kv_heads, n_heads // n_kv_heads * length, head_dim)
    scaled = (queries.astype(mx.float32) * scale).astype(keys.dtype).reshape(grouped)
    logits = scaled @ keys.swapaxes(2, 3)
    return _hidden(logits.reshape(batch, n_heads, length, columns), mask)
