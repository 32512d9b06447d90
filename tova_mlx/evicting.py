"""Attention that evicts: a layer's slots are attended to, then who leaves is settled.

`how` below is what else an attention needs: `scale`, `mask` and `sinks`, as in
`PolicyKVCache.attend`.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from .block import BlockResult, attend_block
from .eviction import choose_victim, update_scores, window_columns
from .journal import Scores
from .packed import Rows, to_mlx
from .slots import Slots
from .stack import Stack


def evict(slots: Slots | Stack, scores: mx.array | None = None) -> None:
    """Mark the slot that the next token takes; without scores the oldest leaves."""
    assert slots.positions is not None
    slots.victim = choose_victim(slots.positions, scores, slots.newest, slots.rule)


def evict_oldest(slots: Slots) -> None:
    """Drop what has left by the end of a block that `extend` put in."""
    assert slots.keys is not None
    batch, n = slots.keys.shape[0], slots.keys.shape[2]
    kept = window_columns(slots.rule, n)
    gone = np.setdiff1d(np.arange(n), kept)
    slots.note_gone(np.broadcast_to(gone, (batch, 1, len(gone))))
    slots.keep(np.broadcast_to(kept, (batch, 1, len(kept))))


def evict_by_weights(
    slots: Slots | Stack, output: mx.array, weights: mx.array
) -> mx.array:
    """The output, once the newest query's weights have chosen who leaves."""
    n = weights.shape[3]
    norms, old = Slots.first(slots.norms, n), Slots.first(slots.scores, n)
    scores = update_scores(weights, norms, old, slots.rule)
    slots.remember(scores)
    if slots.evicted:
        evict(slots, scores)
    # Evaluated with the output, or every step's weights would stay alive until
    # something reads the scores.
    tied = [a for a in (slots.victim, slots.scores) if a is not None]
    return mx.depends([output], tied)[0]


def attend_and_keep(
    slots: Slots,
    queries: mx.array,
    keys: Rows,
    values: Rows,
    *,
    cut_once: bool,
    **how: Any,
) -> BlockResult:
    """The attention of a block that `extend` put in, its survivors kept."""
    journal = slots.journal
    result = attend_block(
        queries,
        keys,
        values,
        positions=np.array(slots.positions),
        scores=None if slots.scores is None else np.array(slots.scores),
        norms=None if slots.norms is None else np.array(slots.norms),
        rule=slots.rule,
        cut_once=cut_once,
        n_before=journal.length,
        **how,
    )
    if cut_once and slots.evicted:
        journal.clear()
    else:
        slots.note_gone(result.gone)
    slots.keep(result.survivors)
    slots.remember(to_mlx(result.scores))
    first = slots.offset - len(result.before)
    for step, scores in enumerate(result.before, first):
        journal.scores.append(Scores(step, to_mlx(scores)))
    return result
