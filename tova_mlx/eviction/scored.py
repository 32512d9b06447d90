"""Evictions of a policy that has a score of its own: a step, and those of a block.

Any function of the keys, values and positions held will do, see `policies.Policy`.
"""

from typing import Any

import mlx.core as mx

from ..policies import Rule
from ..storage.device import kernels_wanted
from ..storage.entries import Entries, dequantized, is_plain
from .scan import ScanResult
from .step import choose_victim


def scored_step(
    keys: Entries,
    values: Entries,
    positions: mx.array,
    held: mx.array | None,
    newest: int | mx.array,
    rule: Rule,
) -> tuple[mx.array, mx.array]:
    """Return the victim, uint32 [B, H', 1], of the S slots as they are stored.

    And their scores, float32 [B, H', S].

    positions: int32 [B, H', S]; held: bool [B, 1, S], all if None; newest: the position
    of the newest token, or of each batch row's [B, 1, 1].
    """
    scores = scores_of_step(keys, values, positions, held, rule)
    if held is not None:
        held = mx.broadcast_to(held, positions.shape)
    if not rule.per_head:
        scores = scores.mean(axis=1, keepdims=True)
    return choose_victim(positions, scores, newest, rule, held), scores


def scores_of_step(
    keys: Entries,
    values: Entries,
    positions: mx.array,
    held: mx.array | None,
    rule: Rule,
) -> mx.array:
    """Return the policy's scores, float32 [B, n_kv_heads, S]; see `scored_step`."""
    assert rule.score is not None
    if rule.score_on_gpu is not None and is_plain(keys) and kernels_wanted():
        return rule.score_on_gpu(keys, held)
    shape = positions.shape
    there = mx.ones(shape, mx.bool_) if held is None else mx.broadcast_to(held, shape)
    scores = rule.score(*_prepared(keys, values, rule), positions, there)
    return mx.broadcast_to(scores.astype(mx.float32), keys.shape[:3])


def scored_scan(
    keys: Entries,
    values: Entries,
    positions: mx.array,
    rule: Rule,
    *,
    limit: int | None,
    length: int,
    at_eviction: bool = False,
) -> ScanResult:
    """Replay the steps of the last `length` columns, as `scan_on_cpu`.

    keys, values: the N columns as they are stored, in order of position; positions:
    int32 [B, H', N]; limit: tokens held after each step, None for all; at_eviction:
    whether that is wanted. Evaluated, unless the policy has a kernel for it: a block's
    graph is thousands of small operations, too much to be left waiting for all layers
    at once.
    """
    n_columns = keys.shape[2]
    n_held = n_columns - length
    pair = _prepared(keys, values, rule)
    flat = (-1, n_columns)
    if rule.scan_on_gpu is not None and kernels_wanted() and not at_eviction:
        first = length if limit is None else max(0, limit - n_held)
        how = {"first_evicting": first, "length": length}
        last = rule.scan_on_gpu(pair[0], positions, rule, **how)
        if last is not None:
            last = last.reshape(flat)
            return ScanResult(last, mx.zeros(last.shape), None)
    columns = mx.arange(n_columns)
    held = mx.broadcast_to(columns < n_held, positions.shape)
    last = mx.full(positions.shape, length, mx.int32)
    worth = mx.zeros(positions.shape) if at_eviction else None
    for step in range(length):
        own = n_held + step
        held = held | (columns == own)
        if limit is None or own + 1 <= limit:
            continue
        scores = _scores(pair, positions, held, rule)
        newest = positions[:, :, own : own + 1]
        evicted = columns == choose_victim(positions, scores, newest, rule, held)
        last, held = mx.where(evicted, step, last), held & ~evicted
        if worth is not None:
            worth = mx.where(evicted, scores, worth)
    mx.eval(last, worth)
    return ScanResult(
        last.reshape(flat),
        mx.zeros(last.shape).reshape(flat),
        None,
        None if worth is None else worth.reshape(flat),
    )


def _prepared(keys: Entries, values: Entries, rule: Rule) -> tuple[Any, Any]:
    pair = dequantized(keys), dequantized(values)
    return pair if rule.prepare is None else rule.prepare(*pair)


def _scores(
    pair: tuple[Any, Any], positions: mx.array, held: mx.array, rule: Rule
) -> mx.array:
    """The policy's scores, float32 [B, H', S]."""
    assert rule.score is not None
    scores = rule.score(*pair, positions, held).astype(mx.float32)
    if rule.per_head:
        return mx.broadcast_to(scores, positions.shape)
    return scores.mean(axis=1, keepdims=True)
