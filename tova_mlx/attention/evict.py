"""Attention that evicts: attend to a layer's slots, then choose the victims."""

import mlx.core as mx
import numpy as np

from ..eviction import (
    choose_on_gpu,
    kernels_wanted,
    scored_step,
    scores_of_step,
    step_on_cpu,
    step_on_gpu,
    window_columns,
)
from ..policies import Rule
from ..storage.entries import Entries, first_slots, to_mlx
from ..storage.journal import ScoresBefore
from ..storage.slots import Slots
from ..storage.stack import Stack
from .arguments import AttentionArgs
from .block import BlockResult, attend_block
from .logits import raw_logits
from .softmax import attend_newest, plain_attention


def left_to_kernel(rule: Rule, length: int) -> bool:
    """Whether a kernel writes what is known of new tokens, as it chooses a victim."""
    chosen = rule.reads_attention or rule.score_on_gpu is not None
    return chosen and length == 1 and kernels_wanted()


def evict_oldest(slots: Slots) -> None:
    """Drop what is evicted by the end of a block that `extend` put in."""
    batch, n = slots.keys.shape[0], slots.keys.shape[2]
    kept = window_columns(slots.rule, n)
    evicted = np.setdiff1d(np.arange(n), kept)
    slots.log_evicted(to_mlx(np.broadcast_to(evicted, (batch, 1, len(evicted)))))
    slots.keep(to_mlx(np.broadcast_to(kept, (batch, 1, len(kept)))))


def attend_and_evict(
    slots: Slots | Stack,
    queries: mx.array,
    keys: Entries,
    values: Entries,
    args: AttentionArgs,
) -> mx.array:
    """Attend with one new token per batch row; mark which is evicted after it."""
    n, rule = keys.shape[2], slots.rule
    norms = first_slots(slots.value_norms, n)
    scores = first_slots(slots.scores, n)
    victim, worth = None, None
    if rule.score is not None:
        output, _ = attend_newest(queries, keys, values, args)
        if slots.evicted:
            victim, worth = _scored(slots, n)
    elif slots.fresh is not None:
        # Two passes over the keys: the fused attention gives no weights. The slots go
        # whole into both, the kernel has their logits only, and nothing holds on to
        # them: a view that a kernel makes contiguous, or a second reference when the
        # next token is written, would be a copy of the cache.
        output = plain_attention(queries, keys, values, args)
        logits, scale = raw_logits(queries, keys, args)
        step = step_on_gpu(
            logits,
            slots.positions_of(n, settled=False),
            scores,
            norms,
            slots.fresh,
            slots.newest_of_rows,
            rule,
            evicts=slots.evicted,
            scale=scale,
            sinks=args.sinks,
        )
        slots.settle_as(step.positions, step.value_norms)
        slots.remember(step.scores)
        victim, worth = step.victim, step.scores
    else:
        output, weights = attend_newest(queries, keys, values, args)
        there = slots.positions if slots.evicted else None
        scores, victim = step_on_cpu(weights, there, scores, norms, slots.newest, rule)
        slots.remember(scores)
        worth = scores
    if victim is not None:
        slots.mark(victim, worth)
    return slots.tied(output)


def _scored(slots: Slots | Stack, n: int) -> tuple[mx.array, mx.array]:
    """The victim [B, H', 1] of the first n slots by the rule's score, and the scores.

    The scores are [B, H', n], or those of all KV heads.
    """
    entries = first_slots(slots.keys_to_read, n), first_slots(slots.values, n)
    rule, fresh = slots.rule, slots.fresh
    positions = slots.positions_of(n, settled=fresh is None)
    if fresh is None:
        known = (*entries, positions, slots.held)
        return scored_step(*known, slots.newest, rule)
    # Of the newest token's position nothing is read by a policy's score but its own.
    scores = scores_of_step(*entries, positions, slots.held, rule)
    known = (fresh, slots.newest_of_rows, rule, slots.held)
    victim, positions = choose_on_gpu(scores, positions, *known)
    slots.settle_as(positions, None)
    return victim, scores if rule.per_head else scores.mean(axis=1, keepdims=True)


def attend_and_keep(
    slots: Slots,
    queries: mx.array,
    keys: Entries,
    values: Entries,
    args: AttentionArgs,
    *,
    once: bool,
) -> BlockResult:
    """Attend with a block that `extend` put in; keep what is not evicted."""
    result = attend_block(queries, keys, values, args, slots, once=once)
    if once and slots.evicted:
        slots.journal = slots.journal.empty()
    slots.log_evicted(result.evicted, once=once, scores=result.evicted_scores)
    slots.keep(result.kept)
    slots.remember(result.scores)
    first = slots.offset - len(result.scores_before)
    slots.journal = slots.journal.with_scores(
        *(ScoresBefore(first + i, s) for i, s in enumerate(result.scores_before))
    )
    return result
