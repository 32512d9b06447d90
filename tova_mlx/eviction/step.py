"""The decode step: new scores from the newest query's weights, then the victim.

Lazy `mx.array`s in and out; nothing here waits for the device. Knows nothing about
keys. R below is [B, H'], H' = 1 (layer) or n_kv_heads (head).
"""

import mlx.core as mx

from ..policies import Rule

_NEVER = 2**31 - 1


def update_scores(
    weights: mx.array, norms: mx.array | None, scores: mx.array | None, rule: Rule
) -> mx.array:
    """One step of the recurrence in `policies.base`.

    weights: float32 [B, n_kv_heads, G, S], the newest query's; norms: float32
    [B, n_kv_heads, S] for value-weighted rules; scores: float32 [R, S] or None.
    Returns float32 [R, S]. A weight that is not a number counts as 0, so that one
    broken row cannot poison what a policy remembers.
    """
    if norms is not None:
        weights = weights * norms[:, :, None, :]
    received = weights.mean(axis=2)
    if not rule.per_head:
        received = received.mean(axis=1, keepdims=True)
    received = mx.where(mx.isnan(received), 0.0, received)
    if scores is None or not rule.memory:
        return received
    return rule.memory * scores + received


def choose_victim(
    positions: mx.array, scores: mx.array | None, newest: int, rule: Rule
) -> mx.array:
    """The slot with the lowest score among the unprotected; ties to the oldest.

    positions: int32 [R, S], every slot taken; newest: the position of the newest
    token. Returns int32 [R, 1], always a slot of the cache, whatever the scores hold.
    """
    candidates = None
    if rule.n_sinks:
        candidates = positions >= rule.n_sinks
    if rule.n_recent:
        old = positions <= newest - rule.n_recent
        candidates = old if candidates is None else candidates & old
    if scores is not None:
        if candidates is not None:
            scores = mx.where(candidates, scores, mx.inf)
        # Not "<=": scores that are not numbers must leave all candidates standing.
        lowest = ~(scores > scores.min(axis=-1, keepdims=True))
        candidates = lowest if candidates is None else candidates & lowest
    if candidates is not None:
        positions = mx.where(candidates, positions, _NEVER)
    return mx.argmin(positions, axis=-1, keepdims=True).astype(mx.int32)
