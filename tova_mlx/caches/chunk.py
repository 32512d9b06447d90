"""New tokens of one layer: stored, attended to, and what is evicted then.

What happens to a layer's slots, without the order of calls that a model keeps to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from ..attention.arguments import AttentionArgs
from ..attention.block import Block, merged
from ..attention.evict import (
    attend_and_evict,
    attend_and_keep,
    evict_oldest,
    left_to_kernel,
)
from ..attention.recalled import Ahead, Recalled, attended_most, recall
from ..attention.softmax import attend_newest, plain_attention
from ..eviction import window_mask
from ..storage.archive import Rows
from ..storage.entries import Entries, to_mlx
from ..storage.fields import position_range
from ..storage.recall import Recall
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
        entries = slots.append(*chunk, settle=not left_to_kernel(rule, length))
        if slots.evicted and rule.by_age:
            slots.mark_oldest()
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
    args = _with_recalled(slots, queries, args)
    return _attend(slots, queries, keys, values, args, once=once)


def _attend(
    slots: Slots,
    queries: mx.array,
    keys: Entries,
    values: Entries,
    args: AttentionArgs,
    *,
    once: bool = False,
) -> Attended:
    """As `attend`; what is read of the evicted is among the arguments."""
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
    slots.settle()
    return Attended(slots.tied(plain_attention(queries, keys, values, args)))


def _with_recalled(
    slots: Slots, queries: mx.array, args: AttentionArgs
) -> AttentionArgs:
    """With what the queries read of the evicted."""
    if slots.recall is None:
        return args
    n = length = queries.shape[2]
    known, waiting = _known_before(slots, slots.offset - length)
    watched = slots.observer.wants_recalled
    if not watched:
        n = 1
    asked, shown = queries * args.scale, known.slots
    recalled, read = recall(asked, known.archive, waiting, shown=shown, newest=n)
    last = None if read is None else read[:, :, -1]
    slots.recall = replace(known, read=last)
    if watched and read is not None:
        steps = range(slots.offset - n, slots.offset)
        slots.observer.recalled(steps, read.flatten(2, 3))
    return args._replace(recalled=recalled)


def _known_before(slots: Slots, offset: int) -> tuple[Recall, Rows | None]:
    """The recall, its archive ready to be read, and what waited before `offset`."""
    known = slots.recall
    assert known is not None
    evicted, waiting = known.evicted_before(offset)
    if evicted:
        known = replace(known, archive=known.archive.synced())
    return known, waiting


def is_cut(slots: Slots, length: int) -> bool:
    """Whether something is due within the next `length` tokens: they come in parts."""
    limit, end = slots.rule.max_size, slots.offset + length
    if limit is None:
        return False
    cut = slots.next_cut(max(slots.offset, limit))
    return cut is not None and cut < end


def attend_in_parts(
    slots: Slots, chunk: Chunk, queries: mx.array, args: AttentionArgs
) -> mx.array:
    """Store and attend to a chunk; what is due within it is done as if token by token.

    The model has rotated it as one; where tokens are renumbered, each part is rotated
    on to where it belongs.
    """
    when = slots.renumbering
    outputs, start, length = [], 0, chunk.length
    whole = _Mask(slots, args.array_mask, queries)
    first = slots.next_rotary
    ahead = _Ahead.of(slots, queries * args.scale, chunk.keys)
    while start < length:
        cut = slots.next_cut(slots.offset)
        assert cut is not None
        stop = min(length, start + cut - slots.offset)
        asked, *new = (a[:, :, start:stop] for a in (queries, *chunk))
        behind = first + start, slots.next_rotary
        if when is not None and behind[0] != behind[1]:
            was, now = (position_range(1, 1, n, stop - start) for n in behind)
            asked, new[0] = (
                when.rotated(a.astype(mx.float32), was, now).astype(a.dtype)
                for a in (asked, new[0])
            )
        if stop - start == 1:
            entries = store(slots, Chunk(*new))
            # It lies where a victim was, so columns are not in order.
            mask = whole.cut(slots.positions_of(entries[0].shape[2]), start, stop)
        else:
            there = slots.held_positions()
            batch, heads = there.shape[:2]
            own = position_range(batch, heads, slots.offset, stop - start)
            mask = whole.cut(mx.concatenate([there, own], axis=2), start, stop)
            mask = _without_evicted(slots, stop - start, mask)
            entries = store(slots, Chunk(*new))
        own = args.with_mask(mask)
        if ahead is None:
            attended = attend(slots, asked, *entries, own, once=False)
            slots.do_scheduled()
        else:
            own = own._replace(recalled=ahead.next(slots, stop - start))
            attended = _attend(slots, asked, *entries, own)
            ahead.do_scheduled(slots)
        outputs.append(attended.output)
        start = stop
    return mx.concatenate(outputs, axis=2)


class _Ahead:
    """What all queries of a chunk read of the evicted."""

    def __init__(self, attention: Ahead, newest: mx.array):
        self._attention, self._newest = attention, newest

    @classmethod
    def of(cls, slots: Slots, queries: mx.array, keys: mx.array) -> _Ahead | None:
        """queries: scaled. None: there is no recall, or each part is watched."""
        if slots.recall is None or slots.observer.wants_recalled:
            return None
        slots.recall, _ = _known_before(slots, slots.offset)
        attention = Ahead(queries, keys.shape[1], slots.recall.archive)
        return cls(attention, queries[:, :, -1:])

    def next(self, slots: Slots, n: int) -> Recalled | None:
        """Return what is read by the next n queries, whose tokens are stored."""
        known, waiting = _known_before(slots, slots.offset - n)
        recalled = self._attention.next(n, waiting)
        if not self._attention.left:
            read = attended_most(self._newest, known.archive, shown=known.slots)
            last = None if read is None else read[:, :, -1]
            slots.recall = replace(known, read=last)
        return recalled

    def do_scheduled(self, slots: Slots) -> None:
        """Do what is due; what is archived then is read by the queries left."""
        before = slots.recall
        slots.do_scheduled()
        if not self._attention.left:
            return
        slots.recall, _ = _known_before(slots, slots.offset)
        assert before is not None
        n = slots.recall.archive.count - before.archive.count
        if n and before.waiting is not None:
            rows = before.waiting.cut(0, n)
            self._attention.archived(rows, slots.recall.archive)


class _Mask:
    """The model's mask for a chunk, of which each part takes its own.

    mask: broadcast to [B, n_heads, L, held + L], or None.
    """

    def __init__(self, slots: Slots, mask: mx.array | None, queries: mx.array):
        self._held, self._seen = slots.held_positions(), slots.offset
        self._args, self._queries = AttentionArgs(1.0, mask), queries

    def cut(self, positions: mx.array, start: int, stop: int) -> mx.array | None:
        """Return that of some queries; positions: int32 [B, H', n], of its columns."""
        if self._args.mask is None:
            return None
        n = self._held.shape[2]
        # Those of an empty cache do not know how many rows there are.
        shape = (self._queries.shape[0], *positions.shape[1:])
        positions = mx.broadcast_to(positions, shape)
        before = (self._held[:, :, None] < positions[..., None]).sum(axis=-1)
        after = n + positions - self._seen
        columns = mx.where(positions < self._seen, before, after).astype(mx.int32)
        block = Block(start, stop, columns, False)
        return block.cut_mask(self._args, self._queries, n + self._queries.shape[2])


def _without_evicted(
    slots: Slots, length: int, mask: mx.array | None
) -> mx.array | str:
    """The mask of a part that is stored next, "causal" if nothing else is hidden."""
    rule = slots.rule
    hides = rule.by_age and slots.recall is None
    if hides and slots.offset + length > (rule.max_size or 0) + 1:
        window = to_mlx(window_mask(rule, slots.offset, length))
        return window if mask is None else merged(window, mask, mask.dtype)
    return "causal" if mask is None else mask
