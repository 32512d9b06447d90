"""Attention of new rows: with the weights that the newest gave, and to packed rows."""

from typing import Any

import mlx.core as mx

from ..storage.packed import Packed, Rows, product
from .logits import masked_logits

# Rows of logits at once, where they are written out.
BLOCK = 256


def attend_newest(
    queries: mx.array,
    keys: Any,
    values: Any,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Output [B, n_heads, 1, D] and softmax weights, float32 [B, n_kv_heads, G, S].

    queries: [B, n_heads, 1, head_dim]; keys, values: rows [B, n_kv_heads, S, ·];
    sinks: learned logits [n_heads], in the denominator only.
    """
    weights = _weights(queries, keys, scale, mask, sinks)
    grouped = weights.reshape(*weights.shape[:1], keys.shape[1], -1, weights.shape[3])
    if isinstance(values, Packed) or not mx.metal.is_available():
        # The fallback of mx.fast takes twice as long on the CPU.
        return _output(weights, values, queries), grouped
    output = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=scale, mask=mask, sinks=sinks
    )
    return output, grouped


def plain_attention(
    queries: mx.array, keys: Any, values: Any, *, mask: Any, **how: Any
) -> mx.array:
    """Output [B, n_heads, L, D]; `how`: scale and sinks; mask "causal" as well.

    Packed rows are not unpacked: the products read them as they are.
    """
    if not isinstance(values, Packed):
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, mask=mask, **how
        )
    length, columns = queries.shape[2], keys.shape[2]
    outputs = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        if isinstance(mask, mx.array):
            cut = mask.ndim > 1 and mask.shape[-2] > 1
            rows = mask[..., start:stop, :] if cut else mask
        elif mask == "causal":
            last = mx.arange(columns - length + start, columns - length + stop)
            rows = mx.arange(columns) <= last[:, None]
        else:
            rows = None
        some = queries[:, :, start:stop]
        weights = _weights(some, keys, how["scale"], rows, how["sinks"])
        outputs.append(_output(weights, values, some))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _weights(
    queries: mx.array,
    keys: Rows,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Float32 [B, n_heads, L, S]."""
    logits = masked_logits(queries, keys, scale, mask)
    if sinks is None:
        return mx.softmax(logits, axis=-1, precise=True)
    learned = sinks.astype(mx.float32)[:, None, None]
    learned = mx.broadcast_to(learned, (*logits.shape[:3], 1))
    joined = mx.concatenate([learned, logits], axis=-1)
    return mx.softmax(joined, axis=-1, precise=True)[..., 1:]


def _output(weights: mx.array, values: Rows, queries: mx.array) -> mx.array:
    """weights [B, n_heads, L, S] times values, in the type of the queries."""
    batch, n_heads, length, columns = weights.shape
    n_kv_heads, width = values.shape[1], values.shape[3]
    grouped = weights.reshape(batch, n_kv_heads, -1, columns)
    if isinstance(values, Packed):
        output = product(grouped, values, transpose=False).astype(queries.dtype)
    else:
        output = grouped.astype(values.dtype) @ values
    return output.reshape(batch, n_heads, length, width)
