"""Attention that evicts: a layer's slots are attended to, then who leaves is settled.

`how` below is what else an attention needs: `scale`, `mask` and `sinks`, as in
`PolicyKVCache.attend`.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from ..eviction import (
    choose_victim,
    directions,
    kernels_wanted,
    key_scores,
    step_on_cpu,
    step_on_gpu,
    window_columns,
)
from ..storage.journal import Scores
from ..storage.packed import Rows, to_mlx
from ..storage.slots import Slots, numbered
from ..storage.stack import Stack
from .block import BlockResult, attend_block
from .logits import masked_logits
from .softmax import attend_newest, plain_attention


def evict_unseen(slots: Slots | Stack) -> None:
    """Mark the oldest that may leave: its slot is the next token's."""
    assert slots.positions is not None
    slots.victim = choose_victim(slots.positions, None, slots.newest, slots.rule)


def evict_oldest(slots: Slots) -> None:
    """Drop what has left by the end of a block that `extend` put in."""
    assert slots.keys is not None
    batch, n = slots.keys.shape[0], slots.keys.shape[2]
    kept = window_columns(slots.rule, n)
    gone = np.setdiff1d(np.arange(n), kept)
    slots.note_gone(to_mlx(np.broadcast_to(gone, (batch, 1, len(gone)))))
    slots.keep(to_mlx(np.broadcast_to(kept, (batch, 1, len(kept)))))


def attend_and_evict(
    slots: Slots | Stack, queries: mx.array, keys: Rows, values: Rows, **how: Any
) -> mx.array:
    """The attention of one new row a row of the batch; marks who leaves after it."""
    n = keys.shape[2]
    norms, old = Slots.first(slots.norms, n), Slots.first(slots.scores, n)
    scores = victim = None
    if slots.rule.reads_keys:
        output, _ = attend_newest(queries, keys, values, **how)
        if slots.evicted:
            assert slots.positions is not None
            held = directions(Slots.first(slots.keys, n))
            ranks = key_scores(held, slots.rule)
            victim = choose_victim(slots.positions, ranks, slots.newest, slots.rule)
    elif kernels_wanted():
        # Two passes over the keys: the fused attention gives no weights. The slots go
        # whole into both, the kernel has their logits only, and nothing holds on to
        # them: a view that a kernel makes contiguous, or a second reference when the
        # next row is written, would be a copy of the cache.
        output = plain_attention(queries, keys, values, **how)
        logits = masked_logits(queries, keys, how["scale"], how["mask"], own_type=True)
        positions = slots.positions
        if positions is None:
            batch, choosers = keys.shape[0], keys.shape[1] if slots.rule.per_head else 1
            positions = numbered(batch, choosers, 0, n)
        scores, victim = step_on_gpu(
            logits,
            Slots.first(positions, n),
            old,
            norms,
            slots.newest,
            slots.rule,
            evicts=slots.evicted,
            sinks=how["sinks"],
        )
    else:
        output, weights = attend_newest(queries, keys, values, **how)
        there = slots.positions if slots.evicted else None
        scores, victim = step_on_cpu(
            weights, there, old, norms, slots.newest, slots.rule
        )
    if scores is not None:
        slots.remember(scores)
    slots.victim = victim
    return slots.tied(output)


def attend_and_keep(
    slots: Slots,
    queries: mx.array,
    keys: Rows,
    values: Rows,
    *,
    once: bool,
    **how: Any,
) -> BlockResult:
    """The attention of a block that `extend` put in, its survivors kept."""
    n_before = slots.journal.length
    assert slots.keys is not None
    assert slots.positions is not None
    result = attend_block(
        queries,
        keys,
        values,
        stored=slots.keys,
        positions=slots.positions,
        scores=slots.scores,
        norms=slots.norms,
        rule=slots.rule,
        once=once,
        n_before=n_before,
        **how,
    )
    if once and slots.evicted:
        slots.journal = slots.journal.empty()
    else:
        slots.note_gone(result.gone)
    slots.keep(result.survivors)
    slots.remember(result.scores)
    first = slots.offset - len(result.before)
    before = [Scores(step, scores) for step, scores in enumerate(result.before, first)]
    slots.journal = slots.journal.with_scores(*before)
    return result
