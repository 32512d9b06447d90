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
from ..attention.recalled import Ahead, attended_most, recall
from ..attention.softmax import attend_newest, plain_attention
from ..eviction import window_mask
from ..storage.archive import Rows
from ..storage.entries import Entries, to_mlx
from ..storage.fields import position_range
from ..storage.recall import Asked, Recall
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
    once: bool = False,
    ahead: Ahead | None = None,
) -> Attended:
    """Attend to what `store` gave; evict afterwards what the rule says.

    ahead: what the queries read of an archive, if they are a part of a chunk.
    """
    args = _with_recalled(slots, queries, args, ahead)
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
    slots: Slots, queries: mx.array, args: AttentionArgs, ahead: Ahead | None
) -> AttentionArgs:
    """With what the queries read of the evicted."""
    if slots.recall is None:
        return args
    n, asked = queries.shape[2], queries * args.scale
    known, waiting = _known_before(slots, slots.offset - n)
    archive = known.archive
    # Scaled by itself: a cut of all that are scaled would hold them all in memory.
    newest = Asked(queries[:, :, -1:] * args.scale, archive.count)
    slots.recall = replace(known, asked=newest)
    if slots.observer.wants_recalled:
        read = attended_most(asked, archive, archive.count, known.slots)
        if read is not None:
            steps = range(slots.offset - n, slots.offset)
            positions = to_mlx(read.reshape(*read.shape[:2], -1))
            slots.observer.recalled(steps, positions)
    if ahead is not None:
        return args._replace(recalled=ahead.next(n, waiting))
    return args._replace(recalled=recall(asked, archive, waiting))


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
    ahead = None
    if slots.recall is not None:
        slots.recall, _ = _known_before(slots, slots.offset)
        archive = slots.recall.archive
        ahead = Ahead(queries * args.scale, chunk.keys.shape[1], archive)
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
        attended = attend(slots, asked, *entries, args.with_mask(mask), ahead=ahead)
        _do_scheduled(slots, ahead)
        outputs.append(attended.output)
        start = stop
    return mx.concatenate(outputs, axis=2)


def _do_scheduled(slots: Slots, ahead: Ahead | None) -> None:
    """Do what is due; the queries left read what is archived then."""
    slots.do_scheduled()
    if ahead is not None and ahead.left:
        slots.recall, _ = _known_before(slots, slots.offset)
        ahead.read(slots.recall.archive)


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
