"""Logits and weights, in float32 whatever the model's type."""

import mlx.core as mx


def masked_logits(
    queries: mx.array, keys: mx.array, scale: float, mask: mx.array | str | None
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
    logits = scaled @ keys.astype(mx.float32).swapaxes(2, 3)
    logits = logits.reshape(batch, n_heads, length, columns)
    if not isinstance(mask, mx.array):
        return logits
    if mask.dtype == mx.bool_:
        return mx.where(mask, logits, -mx.inf)
    return logits + mask.astype(mx.float32)


def newest_weights(
    queries: mx.array,
    keys: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """One query's softmax weights, float32 [B, n_kv_heads, G, S].

    queries: [B, n_heads, 1, head_dim]; keys: [B, n_kv_heads, S, head_dim]; sinks:
    learned logits [n_heads], in the denominator only.
    """
    batch, n_kv_heads, columns = keys.shape[:3]
    logits = masked_logits(queries, keys, scale, mask)
    logits = logits.reshape(batch, n_kv_heads, -1, columns)
    if sinks is None:
        return mx.softmax(logits, axis=-1, precise=True)
    learned = sinks.astype(mx.float32).reshape(1, n_kv_heads, -1, 1)
    learned = mx.broadcast_to(learned, (*logits.shape[:3], 1))
    joined = mx.concatenate([learned, logits], axis=-1)
    return mx.softmax(joined, axis=-1, precise=True)[..., 1:]
