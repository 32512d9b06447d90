"""Logits, in float32 whatever the model's type."""

import mlx.core as mx

from ..storage.entries import Entries, is_plain, product
from .arguments import AttentionArgs


def masked_logits(queries: mx.array, keys: Entries, args: AttentionArgs) -> mx.array:
    """Return q·kᵀ·scale + mask, float32 [B, n_heads, L, S], -inf where a mask hides.

    queries: [B, n_heads, L, head_dim]; keys: [B, n_kv_heads, S, head_dim]; a mask that
    is not an array hides nothing.
    """
    scaled = _grouped(queries.astype(mx.float32), keys) * args.scale
    logits = product(scaled, keys, transpose=True)
    return _masked(logits.reshape(*queries.shape[:3], keys.shape[2]), args.array_mask)


def raw_logits(
    queries: mx.array, keys: Entries, args: AttentionArgs
) -> tuple[mx.array, float]:
    """Return masked logits [B, n_heads, L, S], and what they are still to be scaled by.

    As `masked_logits`, but in the keys' own type unless they are quantised or the mask
    is added: float32 would take a copy of all keys. What is lost are digits of great
    logits (docs/metal.md says what that costs); products add up in float32.
    """
    grouped = _grouped(queries, keys)
    if is_plain(keys):
        logits = grouped.astype(keys.dtype) @ keys.swapaxes(2, 3)
    else:
        logits = product(grouped, keys, transpose=True)
    logits = logits.reshape(*queries.shape[:3], keys.shape[2])
    mask, scale = args.array_mask, args.scale
    if mask is not None and mask.dtype != mx.bool_:
        logits, scale = logits.astype(mx.float32) * scale, 1.0
    return _masked(logits, mask), scale


def _grouped(queries: mx.array, keys: Entries) -> mx.array:
    """The queries of a group in one matrix product with their KV head."""
    batch, _, _, head_dim = queries.shape
    return queries.reshape(batch, keys.shape[1], -1, head_dim)


def _masked(logits: mx.array, mask: mx.array | None) -> mx.array:
    if mask is None:
        return logits
    if mask.dtype == mx.bool_:
        return mx.where(mask, logits, mx.array(-mx.inf, logits.dtype))
    return logits.astype(mx.float32) + mask.astype(mx.float32)
