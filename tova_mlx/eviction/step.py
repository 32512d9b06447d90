"""The decode step: new scores from the newest query's weights, then the victim.

Lazy `mx.array`s in and out; nothing here waits for the device. Knows nothing about
keys. R below is [B, H'], H' = 1 (layer) or n_kv_heads (head).
"""

import mlx.core as mx

from ..policies import Rule

_NEVER = 2**31 - 1


def update_scores(
    weights: mx.array, value_norms: mx.array | None, scores: mx.array | None, rule: Rule
) -> mx.array:
    """One step of the recurrence in `policies.base`.

    weights: float32 [B, n_kv_heads, G, S], the newest query's; value_norms:
    float32 [B, n_kv_heads, S] for value-weighted rules; scores: float32 [R, S] or None.
    Returns float32 [R, S]. A weight that is not a number counts as 0, so that one
    broken query cannot poison what a policy remembers.
    """
    if value_norms is not None:
        weights = weights * value_norms[:, :, None, :]
    batch, n_kv_heads, _, columns = weights.shape
    heads = n_kv_heads if rule.per_head else 1
    received = weights.reshape(batch, heads, -1, columns).mean(axis=2)
    if rule.memory or rule.value_weighted:
        received = mx.where(mx.isnan(received), 0.0, received)
    if scores is None or not rule.memory:
        return received
    return rule.memory * scores + received


def choose_victim(
    positions: mx.array,
    scores: mx.array | None,
    newest: int | mx.array,
    rule: Rule,
    held: mx.array | None = None,
) -> mx.array:
    """The slot with the lowest score among the unprotected; ties to the oldest.

    positions: int32 [R, S]; newest: the position of the newest token, or of each
    batch row's [B, 1, 1]; held: bool [R, S], the slots taken, all if None. Returns
    uint32 [R, 1], always a slot of the cache, whatever the scores hold.
    """
    ages, candidates = positions, held
    if rule.n_sinks or rule.n_recent:
        free = (positions >= rule.n_sinks) & (positions <= newest - rule.n_recent)
        candidates = free if held is None else free & held
    if candidates is not None:
        ages = mx.where(candidates, ages, _NEVER)
        if scores is not None:
            scores = mx.where(candidates, scores, mx.inf)
    if scores is not None:
        # Scores that are not numbers must leave all candidates standing.
        lowest = scores.min(axis=-1, keepdims=True)
        ages = mx.where(scores > lowest, _NEVER, ages)
    return mx.argmin(ages, axis=-1, keepdims=True)


def step_on_cpu(
    weights: mx.array,
    positions: mx.array | None,
    scores: mx.array | None,
    value_norms: mx.array | None,
    newest: int | mx.array,
    rule: Rule,
) -> tuple[mx.array, mx.array | None]:
    """`update_scores`, then `choose_victim`, or None while `positions` is None."""
    updated = update_scores(weights, value_norms, scores, rule)
    if positions is None:
        return updated, None
    return updated, choose_victim(positions, updated, newest, rule)
