"""Logits, in float32 whatever the model's type."""

import mlx.core as mx

from ..storage.entries import Entries, is_plain, product
from .arguments import AttentionArgs


def masked_logits(
    queries: mx.array, keys: Entries, args: AttentionArgs, *, own_type: bool = False
) -> mx.array:
    """Return q·kᵀ·scale + mask, float32 [B, n_heads, L, S], -inf where a mask hides.

    queries: [B, n_heads, L, head_dim]; keys: [B, n_kv_heads, S, head_dim]; a mask that
    is not an array hides nothing. own_type: in the keys' own type, unless they are
    quantised or the mask is added: float32 would take a copy of all keys. What is lost
    is the logits' last bits; products add up in float32.
    """
    batch, n_heads, length, head_dim = queries.shape
    n_kv_heads, columns = keys.shape[1:3]
    # The queries of a group share one matrix product with their KV head.
    grouped = (batch, n_kv_heads, n_heads // n_kv_heads * length, head_dim)
    scaled = queries.astype(mx.float32).reshape(grouped) * args.scale
    if own_type and is_plain(keys):
        logits = scaled.astype(keys.dtype) @ keys.swapaxes(2, 3)
    else:
        logits = product(scaled, keys, transpose=True)
    logits = logits.reshape(batch, n_heads, length, columns)
    mask = args.array_mask
    if mask is None:
        return logits
    if mask.dtype == mx.bool_:
        return mx.where(mask, logits, mx.array(-mx.inf, logits.dtype))
    return logits.astype(mx.float32) + mask.astype(mx.float32)
