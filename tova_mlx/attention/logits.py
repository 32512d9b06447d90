"""Logits, in float32 whatever the model's type."""

import mlx.core as mx

from ..storage.packed import Packed, Rows, product


def masked_logits(
    queries: mx.array,
    keys: Rows,
    scale: float,
    mask: mx.array | str | None,
    *,
    own_type: bool = False,
) -> mx.array:
    """q·kᵀ·scale + mask, float32 [B, n_heads, L, S], -inf where a mask hides.

    queries: [B, n_heads, L, head_dim]; keys: [B, n_kv_heads, S, head_dim]; mask: bool
    or additive, broadcast to the result; anything that is no array hides nothing.
    own_type: in the keys' own type, unless they are quantised or the mask is added:
    float32 would take a copy of all keys. What is lost is the logits' last bits;
    products add up in float32.
    """
    batch, n_heads, length, head_dim = queries.shape
    n_kv_heads, columns = keys.shape[1:3]
    # A group's rows share one matrix product with their KV head.
    grouped = (batch, n_kv_heads, n_heads // n_kv_heads * length, head_dim)
    scaled = queries.astype(mx.float32).reshape(grouped) * scale
    if own_type and not isinstance(keys, Packed):
        logits = scaled.astype(keys.dtype) @ keys.swapaxes(2, 3)
    else:
        logits = product(scaled, keys, transpose=True)
    logits = logits.reshape(batch, n_heads, length, columns)
    if not isinstance(mask, mx.array):
        return logits
    if mask.dtype == mx.bool_:
        return mx.where(mask, logits, mx.array(-mx.inf, logits.dtype))
    return logits.astype(mx.float32) + mask.astype(mx.float32)
