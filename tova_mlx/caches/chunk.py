"""New tokens of one layer: stored, attended to, and what is evicted then.

What happens to a layer's slots, without the order of calls that a model keeps to.
"""

from typing import NamedTuple

import mlx.core as mx

from ..attention.arguments import AttentionArgs
from ..attention.block import Block
from ..attention.evict import (
    attend_and_evict,
    attend_and_keep,
    evict_oldest,
    mark_oldest,
)
from ..attention.softmax import attend_newest, plain_attention
from ..eviction import window_mask
from ..storage.entries import Entries, to_mlx
from ..storage.fields import position_range
from ..storage.slots import Slots


class Attended(NamedTuple):
    """Output [B, n_heads, L, head_dim]; blocks: what each query saw, if not all."""

    output: mx.array
    blocks: list[Block] | None = None


class Chunk(NamedTuple):
    """New keys and values [B, n_kv_heads, L, head_dim] that are not stored yet."""

    keys: mx.array
    values: mx.array

    @property
    def length(self) -> int:
        return self.keys.shape[2]


def store(slots: Slots, chunk: Chunk) -> tuple[Entries, Entries]:
    """Store new tokens; return all that they may attend to."""
    rule, length = slots.rule, chunk.length
    fits = rule.max_size is None or slots.offset + length <= rule.max_size
    # A memory must see every query, so even a chunk that fits is scanned.
    if length == 1 or (fits and not rule.memory):
        entries = slots.append(*chunk)
        if slots.evicted and rule.by_age:
            mark_oldest(slots)
    else:
        entries = slots.extend(*chunk)
        if rule.by_age:
            evict_oldest(slots)
    return entries


def attend(
    slots: Slots,
    queries: mx.array,
    keys: Entries,
    values: Entries,
    args: AttentionArgs,
    *,
    once: bool,
) -> Attended:
    """Attend to what `store` gave; evict afterwards what the rule says."""
    rule, one = slots.rule, queries.shape[2] == 1
    if rule.by_age:
        if one and slots.evicted:
            return Attended(slots.tied(attend_newest(queries, keys, values, args)[0]))
        return Attended(slots.tied(plain_attention(queries, keys, values, args)))
    if one and (rule.memory or slots.evicted):
        return Attended(attend_and_evict(slots, queries, keys, values, args))
    if rule.memory or slots.evicted:
        result = attend_and_keep(slots, queries, keys, values, args, once=once)
        return Attended(result.output, result.blocks)
    return Attended(slots.tied(plain_attention(queries, keys, values, args)))


def is_cut(slots: Slots, length: int) -> bool:
    """Whether tokens are renumbered within the next `length`, so they come in parts."""
    when, limit = slots.renumbering, slots.rule.max_size
    if when is None or limit is None:
        return False
    last = (slots.offset + length - 1) // when.period * when.period
    return last > max(slots.offset, limit) and when.is_due(last)


def attend_in_parts(
    slots: Slots, chunk: Chunk, queries: mx.array, args: AttentionArgs
) -> mx.array:
    """Store and attend to a chunk; renumber within it as if it came token by token.

    The model has rotated it as one; each part is rotated on to where it belongs.
    """
    when, rule = slots.renumbering, slots.rule
    assert when is not None
    outputs, start, length = [], 0, chunk.length
    columns = _Columns(slots, length)
    first = slots.next_rotary
    while start < length:
        stop = min(length, start + when.rest(slots.offset))
        asked, *new = (a[:, :, start:stop] for a in (queries, *chunk))
        behind = first + start, slots.next_rotary
        if behind[0] != behind[1]:
            was, now = (position_range(1, 1, n, stop - start) for n in behind)
            asked, new[0] = (
                when.rotated(a.astype(mx.float32), was, now).astype(a.dtype)
                for a in (asked, new[0])
            )
        mask = columns.cut_mask(args, slots, queries, start, stop)
        if rule.by_age:
            mask = _windowed(slots, stop - start, mask)
        entries = store(slots, Chunk(*new))
        part = args.with_mask(mask if mask is not None else "causal")
        outputs.append(attend(slots, asked, *entries, part, once=False).output)
        slots.renumber()
        start = stop
    return mx.concatenate(outputs, axis=2)


class _Columns:
    """Which columns of a chunk's mask [.., L, held + L] are held when a part comes."""

    def __init__(self, slots: Slots, length: int):
        self._held, self._offset = slots.held_positions(), slots.offset
        self._length = length

    def cut_mask(
        self,
        args: AttentionArgs,
        slots: Slots,
        queries: mx.array,
        start: int,
        stop: int,
    ) -> mx.array | None:
        """Return the model's mask, if it is an array, for the part that comes now."""
        if args.array_mask is None:
            return None
        batch, n = queries.shape[0], self._held.shape[2]
        positions = slots.held_positions()
        if slots.offset == 0:
            positions = mx.zeros((batch, 1, 0), mx.int32)
        before = (self._held[:, :, None] < positions[..., None]).sum(axis=-1)
        after = n + positions - self._offset
        held = mx.where(positions < self._offset, before, after).astype(mx.int32)
        own = position_range(batch, held.shape[1], n + start, stop - start)
        block = Block(start, stop, mx.concatenate([held, own], axis=2), False)
        return block.cut_mask(args, queries, n + self._length)


def _windowed(slots: Slots, length: int, mask: mx.array | None) -> mx.array | None:
    """The mask of a part, of which those are hidden that were evicted by age."""
    limit = slots.rule.max_size
    if length == 1 or limit is None or slots.offset + length <= limit + 1:
        return mask
    window = to_mlx(window_mask(slots.rule, slots.offset, length))
    if mask is None:
        return window
    if mask.dtype == mx.bool_:
        return mask & window
    return mx.where(window, mask, mx.array(-mx.inf, mask.dtype))
