"""Attention that evicts: attend to a layer's slots, then choose the victims."""

import mlx.core as mx
import numpy as np

from ..eviction import (
    choose_victim,
    kernels_wanted,
    scored_step,
    step_on_cpu,
    step_on_gpu,
    window_columns,
)
from ..storage.entries import Entries, first_slots, to_mlx
from ..storage.journal import ScoresBefore
from ..storage.slots import Slots
from ..storage.stack import Stack
from .arguments import AttentionArgs
from .block import BlockResult, attend_block
from .logits import masked_logits
from .softmax import attend_newest, plain_attention


def mark_oldest(slots: Slots | Stack) -> None:
    """Mark the oldest token that is not protected: its slot is the next token's."""
    assert slots.positions is not None
    slots.mark(choose_victim(slots.positions, None, slots.newest, slots.rule))


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
            assert slots.positions is not None
            victim, worth = scored_step(
                first_slots(slots.keys_to_read, n),
                first_slots(slots.values, n),
                first_slots(slots.positions, n),
                slots.held,
                slots.newest,
                rule,
            )
    elif kernels_wanted():
        # Two passes over the keys: the fused attention gives no weights. The slots go
        # whole into both, the kernel has their logits only, and nothing holds on to
        # them: a view that a kernel makes contiguous, or a second reference when the
        # next token is written, would be a copy of the cache.
        output = plain_attention(queries, keys, values, args)
        logits = masked_logits(queries, keys, args, own_type=True)
        scores, victim = step_on_gpu(
            logits,
            slots.positions_of(n),
            scores,
            norms,
            slots.newest,
            rule,
            evicts=slots.evicted,
            sinks=args.sinks,
        )
        slots.remember(scores)
        worth = scores
    else:
        output, weights = attend_newest(queries, keys, values, args)
        there = slots.positions if slots.evicted else None
        scores, victim = step_on_cpu(weights, there, scores, norms, slots.newest, rule)
        slots.remember(scores)
        worth = scores
    if victim is not None:
        slots.mark(victim, worth)
    else:
        slots.victim = None
    return slots.tied(output)


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
