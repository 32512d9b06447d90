"""Attention of a block of new tokens, with evictions between them.

One matmul for the logits, the scan for what each query sees, one masked attention for
the outputs. Long chunks are cut into blocks and the columns evicted dropped between
them, so that logits stay small and attention costs queries x (max_size + block). How
many are held is known beforehand, so nothing here waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..eviction import Columns, ScanResult, cut_once, scan_block, scored_scan
from ..storage.entries import Entries, first_slots, gather
from ..storage.fields import position_range, tokens_held
from ..storage.slots import Slots
from .arguments import AttentionArgs
from .logits import masked_logits
from .softmax import BLOCK, plain_attention


class BlockResult(NamedTuple):
    """Output [B, n_heads, L, head_dim], and what became of the columns.

    kept: int32 [B, H', n], the columns still held, and their scores; evicted: columns
    [B, H', n] in order of step, and the scores that they were evicted with, if an
    observer wants them; scores_before: the scores [B, H', n] of those held before each
    of the last steps, in order of position (rules with memory).
    """

    output: mx.array
    kept: mx.array
    scores: mx.array
    evicted: mx.array
    evicted_scores: mx.array | None
    scores_before: list[mx.array]
    blocks: list["Block"]


class Block(NamedTuple):
    """Queries start to stop, the columns they may see, and which each one does.

    columns: int32 [B, H', m]; is_first: they are the first m; visible: bool
    [B, H', L, m], None until scanned.
    """

    start: int
    stop: int
    columns: mx.array
    is_first: bool
    visible: mx.array | None = None

    @property
    def length(self) -> int:
        return self.stop - self.start

    def cut(self, entries: Entries) -> Entries:
        """Return the block's columns of entries."""
        if self.is_first:
            return first_slots(entries, self.columns.shape[2])
        return gather(entries, self.columns)

    def cut_mask(self, args: AttentionArgs, queries: mx.array, columns: int):
        """Return the model's mask, an array or None, for this block.

        queries: all of them, [B, n_heads, L, D], for their shape; columns: how many
        there are in all; any axis of the mask may be 1.
        """
        mask = args.array_mask
        if mask is None:
            return None
        n_heads, length = queries.shape[1:3]
        batch, heads, m = self.columns.shape
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        mask = mx.broadcast_to(mask, (*mask.shape[:2], length, columns))
        mask = mask[:, :, self.start : self.stop]
        if self.is_first:
            return mask[..., :m]
        index = mx.repeat(self.columns, n_heads // heads, axis=1)[:, :, None]
        mask = mx.broadcast_to(mask, (batch, n_heads, self.length, columns))
        index = mx.broadcast_to(index, (batch, n_heads, self.length, m))
        return mx.take_along_axis(mask, index, axis=3)


def attend_block(
    queries: mx.array,
    keys: Entries,
    values: Entries,
    args: AttentionArgs,
    slots: Slots,
    *,
    once: bool,
) -> BlockResult:
    """Attend with L queries to the columns held plus their own; evict between them.

    queries: [B, n_heads, L, D]; keys, values: [B, n_kv_heads, N, D], N = held + L, in
    order of position; slots: what the cache stores, as `extend` left it. "causal" is
    what a query may look at if the mask is not an array; once: evict after the last
    query only.
    """
    batch, _, length, _ = queries.shape
    assert slots.positions is not None
    n_held, heads = keys.shape[2] - length, slots.positions.shape[1]
    held = position_range(batch, heads, 0, n_held)
    scores = mx.zeros(held.shape) if slots.scores is None else slots.scores
    outputs, evicted, worth, scores_before, blocks = [], [], [], [], []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        own = position_range(batch, heads, n_held + start, stop - start)
        columns = mx.concatenate([held, own], axis=2)
        block = Block(start, stop, columns, columns.shape[2] == n_held + stop)
        cut = _Cut(block, queries, keys, values, args)
        # The last steps are of interest for the journal, wherever blocks end.
        n_before = slots.journal.length - (length - stop)
        last_of_once = once and stop == length
        scan = _scan(block, cut, slots, scores, once=once, n_before=n_before)
        if last_of_once:
            scan = cut_once(scan, _flat(_take(slots.positions, columns)), slots.rule)
        steps = _Steps(scan, block)
        n_kept = columns.shape[2]
        if not once or last_of_once:
            n_kept = tokens_held(n_kept, slots.rule.max_size)
        kept = steps.held_after(n_kept)
        if slots.logs and n_kept < columns.shape[2]:
            gone = steps.evicted(columns.shape[2] - n_kept)
            evicted.append(_take(columns, gone))
            if steps.at_eviction is not None:
                worth.append(_take(steps.at_eviction, gone))
        scores_before += steps.scores_before(slots.rule.max_size)
        held, scores = _take(columns, kept), _take(steps.scores, kept)
        blocks.append(block._replace(visible=steps.visible()))
        if slots.recall is None:
            outputs.append(cut.attend(blocks[-1]))
    if slots.recall is not None:
        # Nothing is hidden that was evicted.
        outputs.append(_attend_to_all(queries, keys, values, args))
    return BlockResult(
        _joined(outputs),
        held,
        scores,
        mx.concatenate(evicted, axis=2) if evicted else held[..., :0],
        mx.concatenate(worth, axis=2) if worth else None,
        scores_before,
        blocks,
    )


def _attend_to_all(
    queries: mx.array, keys: Entries, values: Entries, args: AttentionArgs
) -> mx.array:
    length, n = queries.shape[2], keys.shape[2]
    visible = mx.arange(n) <= mx.arange(n - length, n)[:, None]
    args = args.with_mask(merged(visible, args.array_mask, queries.dtype))
    return plain_attention(queries, keys, values, args)


def attend_again(
    blocks: Sequence[Block],
    queries: mx.array,
    keys: Entries,
    values: Entries,
    args: AttentionArgs,
) -> mx.array:
    """Attend with other queries to the columns that an `attend_block` saw."""
    return _joined([_Cut(b, queries, keys, values, args).attend(b) for b in blocks])


class _Cut:
    """A block's queries, keys, values and mask, out of all that an attention got."""

    def __init__(
        self,
        block: Block,
        queries: mx.array,
        keys: Entries,
        values: Entries,
        args: AttentionArgs,
    ):
        self.keys, self.values = block.cut(keys), block.cut(values)
        mask = block.cut_mask(args, queries, keys.shape[2])
        self.args = args.cut(block.start, block.stop, mask)
        self.queries = queries[:, :, block.start : block.stop]

    def attend(self, block: Block) -> mx.array:
        """Attend to what is visible of the columns."""
        visible = block.visible
        assert visible is not None
        if visible.shape[1] > 1:
            per_head = self.queries.shape[1] // visible.shape[1]
            visible = mx.repeat(visible, per_head, axis=1)
        mask = merged(visible, self.args.array_mask, self.queries.dtype)
        args = self.args.with_mask(mask)
        return plain_attention(self.queries, self.keys, self.values, args)


class _Steps:
    """What a scan says of its columns [B, H', m], step by step."""

    def __init__(self, scan: ScanResult, block: Block):
        shape = block.columns.shape
        self.length, self.n_held = block.length, shape[2] - block.length
        self.last, self.scores = scan.last.reshape(shape), scan.scores.reshape(shape)
        self._before, self.at_eviction = scan.before, None
        if scan.at_eviction is not None:
            self.at_eviction = scan.at_eviction.reshape(shape)

    def held_after(self, n: int) -> mx.array:
        """Return the n columns held after the last step [B, H', n], ascending."""
        return _first_of(self.last == self.length, n)

    def evicted(self, n: int) -> mx.array:
        """Return the n columns evicted [B, H', n], in order of step."""
        return mx.argsort(self.last, axis=-1)[..., :n]

    def scores_before(self, limit: int | None) -> list[mx.array]:
        """Return the scores of those held before each of the last steps."""
        if self._before is None:
            return []
        result, n_before = [], self._before.shape[1]
        for i in range(n_before):
            step = self.length - n_before + i
            n = tokens_held(self.n_held + step, limit)
            order = _first_of(self._seen(self.last, step - 1, step), n)
            result.append(_take(self._before[:, i].reshape(self.last.shape), order))
        return result

    def visible(self) -> mx.array:
        """Return which columns each query sees, bool [B, H', L, m]."""
        steps = mx.arange(self.length)[:, None]
        return self._seen(self.last[:, :, None], steps, steps)

    def _seen(self, last: mx.array, newest: mx.array | int, step: mx.array | int):
        """The columns held at `step` among those up to that of the step `newest`."""
        return (mx.arange(last.shape[-1]) <= self.n_held + newest) & (last >= step)


def _scan(
    block: Block,
    cut: _Cut,
    slots: Slots,
    scores: mx.array,
    *,
    once: bool,
    n_before: int,
) -> ScanResult:
    """Replay a block's evictions; scores: [B, H', n], of the columns held before."""
    rule, length, norms = slots.rule, block.length, slots.value_norms
    limit = None if once else rule.max_size
    positions = _take(slots.positions, block.columns)
    wanted = slots.observer.wants_scores
    if rule.score is not None:
        stored = block.cut(slots.keys_to_read), block.cut(slots.values)
        return scored_scan(
            *stored, positions, rule, limit=limit, length=length, at_eviction=wanted
        )
    return scan_block(
        masked_logits(cut.queries, cut.keys, cut.args),
        Columns(
            _flat(positions),
            _flat(mx.pad(scores, [(0, 0), (0, 0), (0, length)])),
            norms if norms is None else gather(norms, block.columns),
        ),
        rule,
        limit=limit,
        n_before=min(length, max(0, n_before)) if rule.memory else 0,
        sinks=cut.args.sinks,
        at_eviction=wanted,
    )


def _flat(array: mx.array) -> mx.array:
    """[B, H', m] as [B * H', m]."""
    return array.reshape(-1, array.shape[2])


def _joined(outputs: list[mx.array]) -> mx.array:
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _take(array: mx.array | None, order: mx.array) -> mx.array:
    assert array is not None
    return mx.take_along_axis(array, order, axis=2)


def _first_of(wanted: mx.array, n: int) -> mx.array:
    """The columns wanted [..., m], of which there are n, in ascending order."""
    m = wanted.shape[-1]
    numbers = mx.arange(m)
    if n == m:
        return mx.broadcast_to(numbers, wanted.shape)
    return mx.argsort(mx.where(wanted, numbers, numbers + m), axis=-1)[..., :n]


def merged(visible: mx.array, mask: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """Return the mask that hides what is not visible too; dtype: if it is added."""
    if mask is None:
        return visible
    if mask.dtype == mx.bool_:
        return visible & mask
    return mx.where(visible, mask.astype(dtype), mx.array(-mx.inf, dtype))
