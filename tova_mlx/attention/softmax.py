"""Attention of new tokens: with the weights of the newest, and to quantised entries."""

from typing import Any

import mlx.core as mx

from ..storage.device import on_gpu
from ..storage.entries import Entries, is_plain, product
from .arguments import AttentionArgs
from .logits import masked_logits

# Queries whose logits are written out at once.
BLOCK = 256


def attend_newest(
    queries: mx.array, keys: Any, values: Any, args: AttentionArgs
) -> tuple[mx.array, mx.array]:
    """Output [B, n_heads, 1, D] and softmax weights, float32 [B, n_kv_heads, G, S].

    queries: [B, n_heads, 1, head_dim]; keys, values: entries [B, n_kv_heads, S, ·].
    """
    output, weights = _attend(queries, keys, values, args)
    if is_plain(values) and args.recalled is None and on_gpu():
        # Not on the CPU: the fallback of mx.fast takes twice as long there.
        output = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=args.scale, mask=args.mask, sinks=args.sinks
        )
    batch, _, _, columns = weights.shape
    return output, weights.reshape(batch, keys.shape[1], -1, columns)


def plain_attention(
    queries: mx.array, keys: Any, values: Any, args: AttentionArgs
) -> mx.array:
    """Output [B, n_heads, L, D], as mlx-lm's own; quantised entries stay as they are.

    queries: [B, n_heads, L, head_dim]; keys, values: entries [B, n_kv_heads, S, ·].
    """
    if is_plain(values) and args.recalled is None:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=args.scale, mask=args.mask, sinks=args.sinks
        )
    length, columns = queries.shape[2], keys.shape[2]
    outputs = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        mask = args.array_mask
        if mask is not None:
            per_query = mask.ndim > 1 and mask.shape[-2] > 1
            mask = mask[..., start:stop, :] if per_query else mask
        elif args.mask == "causal":
            last = mx.arange(columns - length + start, columns - length + stop)
            mask = mx.arange(columns) <= last[:, None]
        own = args.cut(start, stop, mask)
        outputs.append(_attend(queries[:, :, start:stop], keys, values, own)[0])
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _attend(
    queries: mx.array, keys: Entries, values: Entries, args: AttentionArgs
) -> tuple[mx.array, mx.array]:
    """Output, what came back included, and the weights of keys [B, n_heads, L, S]."""
    logits = masked_logits(queries, keys, args)
    if args.sinks is not None:
        logits = _with_sinks(logits, args)
    weights = mx.softmax(logits, axis=-1, precise=True)
    n_learned = 0 if args.sinks is None else 1
    output = _output(weights[..., n_learned:], values, queries)
    if args.recalled is not None:
        # A softmax's greatest weight is that of its greatest logit.
        top, weight = (a.max(axis=-1, keepdims=True) for a in (logits, weights))
        output = args.recalled.merged(output, top - mx.log(weight))
    return output, weights[..., n_learned:]


def _with_sinks(logits: mx.array, args: AttentionArgs) -> mx.array:
    assert args.sinks is not None
    learned = args.sinks.astype(mx.float32)[:, None, None]
    learned = mx.broadcast_to(learned, (*logits.shape[:3], 1))
    return mx.concatenate([learned, logits], axis=-1)


def _output(weights: mx.array, values: Entries, queries: mx.array) -> mx.array:
    """weights [B, n_heads, L, S] times values, in the type of the queries."""
    batch, n_heads, length, columns = weights.shape
    n_kv_heads, width = values.shape[1], values.shape[3]
    grouped = weights.reshape(batch, n_kv_heads, -1, columns)
    if is_plain(values):
        output = grouped.astype(values.dtype) @ values
    else:
        output = product(grouped, values, transpose=False).astype(queries.dtype)
    return output.reshape(batch, n_heads, length, width)
