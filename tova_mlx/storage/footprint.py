"""The bytes that a layer's arrays can reach, before they do."""

from .entries import nbytes
from .slots import Slots


def max_nbytes(slots: Slots) -> int | None:
    """Return the bytes that the arrays can reach; None if unlimited or still empty."""
    limit = slots.rule.max_size
    if limit is None or slots.keys is None:
        return None
    batch, n_kv_heads, n_slots, _ = slots.keys.shape
    per_token = (nbytes(slots.keys) + nbytes(slots.values)) // n_slots
    heads = batch * slots.eviction_heads(slots.keys)
    per_slot = per_token + 4 * batch * n_kv_heads * slots.rule.value_weighted
    renumbered = 0
    if slots.renumbering is not None:
        per_slot += 4 * heads * (1 + slots.keeps_stored)
        if slots.journal.length:
            times = 1 + slots.journal.length // slots.renumbering.period
            renumbered = 8 * heads * limit * times
    memory = bool(slots.rule.memory)
    per_step = per_slot + 4 * heads
    if memory:
        per_step += 8 * heads * (limit + 1) + 4 * heads
    per_slot += 4 * heads * (1 + memory)
    total = per_slot * (limit + 1) + 4 * heads
    if slots.recall is not None:
        row = per_token + 4 * heads
        total += slots.recall.max_nbytes(row, slots.keys)
    return total + per_step * slots.journal.length + renumbered
