"""Attention of one new row, with the weights it gave to what is held."""

import mlx.core as mx

from .logits import masked_logits


def attend_newest(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Output [B, n_heads, 1, D] and softmax weights, float32 [B, n_kv_heads, G, S].

    queries: [B, n_heads, 1, head_dim]; keys, values: [B, n_kv_heads, S, ·]; sinks:
    learned logits [n_heads], in the denominator only.
    """
    weights = _weights(queries, keys, scale, mask, sinks)
    if mx.metal.is_available():
        output = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )
        return output, weights
    # The fallback of mx.fast takes twice as long on the CPU.
    shape = (*queries.shape[:3], values.shape[3])
    return (weights.astype(values.dtype) @ values).reshape(shape), weights


def _weights(
    queries: mx.array,
    keys: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    batch, n_kv_heads, columns = keys.shape[:3]
    logits = masked_logits(queries, keys, scale, mask)
    logits = logits.reshape(batch, n_kv_heads, -1, columns)
    if sinks is None:
        return mx.softmax(logits, axis=-1, precise=True)
    learned = sinks.astype(mx.float32).reshape(1, n_kv_heads, -1, 1)
    learned = mx.broadcast_to(learned, (*logits.shape[:3], 1))
    joined = mx.concatenate([learned, logits], axis=-1)
    return mx.softmax(joined, axis=-1, precise=True)[..., 1:]
