"""Attention of a block of new rows, with evictions between the rows.

One matmul for the logits, the scan for who was alive, one masked attention for the
outputs. Long chunks are cut into blocks and the dead columns dropped between them, so
that logits stay small and attention costs rows x (max_size + block). How many are
alive is known beforehand, so nothing here waits for the device.
"""

from typing import Any, NamedTuple

import mlx.core as mx

from ..eviction import cut_once, scan_block, scan_keys
from ..policies import Rule
from ..storage.packed import Rows, gather
from ..storage.slots import Slots, held, numbered
from .logits import masked_logits
from .softmax import BLOCK, plain_attention


class BlockResult(NamedTuple):
    """Output [B, n_heads, L, head_dim], and what became of the columns.

    survivors: int32 [B, H', kept] and their scores; gone: the columns that left, in
    order of step [B, H', n]; before: the scores [B, H', n] of those held before each
    of the last rows, in order of position (rules with memory).
    """

    output: mx.array
    survivors: mx.array
    scores: mx.array
    gone: mx.array
    before: list[mx.array]
    blocks: list["Block"]


class Block(NamedTuple):
    """Rows start to stop, the columns they may see, and who was alive for each.

    columns: int32 [B, H', m]; is_first: they are the first m; alive: bool
    [B, H', rows, m], None until scanned.
    """

    start: int
    stop: int
    columns: mx.array
    is_first: bool
    alive: mx.array | None = None


def attend_block(
    queries: mx.array,
    keys: Rows,
    values: Rows,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    stored: Rows,
    positions: mx.array,
    scores: mx.array | None,
    norms: mx.array | None,
    rule: Rule,
    once: bool,
    n_before: int,
) -> BlockResult:
    """Outputs and survivors of L rows over the columns held plus their own.

    queries: [B, n_heads, L, D]; keys, values: [B, n_kv_heads, N, D], N = held + L, in
    order of position; stored: the cache's own keys, which may be others; positions:
    int32 [B, H', N]; scores: float32 [B, H', held]; norms: float32 [B, n_kv_heads, N].
    "causal" is what a row may look at if the mask is no array; n_before: for how many
    of the last rows `gone` and `before` are wanted.
    """
    batch, _, length, _ = queries.shape
    choosers = positions.shape[1]
    n_held = keys.shape[2] - length
    living = numbered(batch, choosers, 0, n_held)
    living_scores = mx.zeros(living.shape) if scores is None else scores
    outputs, gone, before, blocks = [], [], [], []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        n_rows, n_living = stop - start, living.shape[2]
        own = numbered(batch, choosers, n_held + start, n_rows)
        columns = mx.concatenate([living, own], axis=2)
        m = n_living + n_rows
        block = Block(start, stop, columns, m == n_held + stop)
        seen = _cut(block, queries, keys, values, mask)
        flat = (batch * choosers, m)
        places = mx.take_along_axis(positions, columns, axis=2).reshape(flat)
        noted = min(n_rows, max(0, n_before - (length - stop))) if rule.memory else 0
        lengths = None if norms is None else gather(norms, columns)
        limit = None if once else rule.max_size
        if rule.reads_keys:
            own_keys = _of_block(stored, block)
            result = scan_keys(own_keys, places, rule, limit=limit, n_rows=n_rows)
        else:
            result = scan_block(
                masked_logits(queries[:, :, start:stop], seen[0], scale, seen[2]),
                places,
                mx.pad(living_scores, [(0, 0), (0, 0), (0, n_rows)]).reshape(flat),
                lengths,
                rule,
                limit=limit,
                n_before=noted,
                sinks=sinks,
            )
        if once and stop == length:
            result = cut_once(result, places, rule)
        last = result.last.reshape(batch, choosers, m)
        kept = held(m, rule.max_size) if stop == length or not once else m
        order = _first_of(last == n_rows, kept)
        living = _take(columns, order)
        living_scores = _take(result.scores.reshape(last.shape), order)
        if n_before and kept < m:
            left = mx.argsort(last, axis=-1)[..., : m - kept]
            gone.append(_take(columns, left))
        for i in range(noted):
            row = n_rows - noted + i
            n = held(n_living + row, rule.max_size)
            assert result.before is not None
            scores_before = result.before[:, i].reshape(last.shape)
            order = _first_of(_alive(last, n_living, row - 1, row), n)
            before.append(_take(scores_before, order))
        steps = mx.arange(n_rows)[:, None]
        alive = _alive(last[:, :, None], n_living, steps, steps)
        blocks.append(block._replace(alive=alive))
        outputs.append(_attend(queries, *seen, blocks[-1], scale, sinks))
    return BlockResult(
        _joined(outputs),
        living,
        living_scores,
        mx.concatenate(gone, axis=2) if gone else living[..., :0],
        before,
        blocks,
    )


def attend_again(
    blocks: list[Block],
    queries: mx.array,
    keys: Rows,
    values: Rows,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of other queries to the columns of an `attend_block`, as alive then."""
    outputs = []
    for block in blocks:
        seen = _cut(block, queries, keys, values, mask)
        outputs.append(_attend(queries, *seen, block, scale, sinks))
    return _joined(outputs)


def _joined(outputs: list[mx.array]) -> mx.array:
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _attend(
    queries: mx.array,
    keys: Rows,
    values: Rows,
    mask: mx.array | None,
    block: Block,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of a block's rows to its columns (`_cut`), dead ones left out."""
    alive = block.alive
    assert alive is not None
    if alive.shape[1] > 1:
        alive = mx.repeat(alive, queries.shape[1] // alive.shape[1], axis=1)
    return plain_attention(
        queries[:, :, block.start : block.stop],
        keys,
        values,
        scale=scale,
        mask=_merge(alive, mask, queries.dtype),
        sinks=sinks,
    )


def _take(array: mx.array, order: mx.array) -> mx.array:
    return mx.take_along_axis(array, order, axis=2)


def _first_of(wanted: mx.array, n: int) -> mx.array:
    """The columns wanted [..., m], of which there are n, in ascending order."""
    m = wanted.shape[-1]
    numbers = mx.arange(m)
    if n == m:
        return mx.broadcast_to(numbers, wanted.shape)
    return mx.argsort(mx.where(wanted, numbers, numbers + m), axis=-1)[..., :n]


def _alive(last: mx.array, n_living: int, come: Any, row: Any) -> mx.array:
    """Who was alive at `row` among those up to the own column of the row `come`."""
    return (mx.arange(last.shape[-1]) <= n_living + come) & (last >= row)


def _of_block(rows: Rows, block: Block) -> Rows:
    """The columns of a block."""
    if block.is_first:
        return Slots.first(rows, block.columns.shape[2])
    return gather(rows, block.columns)


def _cut(
    block: Block,
    queries: mx.array,
    keys: Rows,
    values: Rows,
    mask: mx.array | str | None,
) -> tuple[Rows, Rows, mx.array | None]:
    """Keys, values and the model's mask [B, n_heads, L, N], cut to a block.

    queries: all of them, [B, n_heads, L, D], for their shape; any axis of the mask may
    be 1.
    """
    n_heads, length = queries.shape[1:3]
    columns = block.columns
    batch, choosers, m = columns.shape
    n_columns = keys.shape[2]
    keys, values = _of_block(keys, block), _of_block(values, block)
    if not isinstance(mask, mx.array):
        return keys, values, None
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    mask = mx.broadcast_to(mask, (*mask.shape[:2], length, n_columns))
    mask = mask[:, :, block.start : block.stop]
    if block.is_first:
        return keys, values, mask[..., :m]
    index = mx.repeat(columns, n_heads // choosers, axis=1)[:, :, None]
    length = block.stop - block.start
    mask = mx.broadcast_to(mask, (batch, n_heads, length, n_columns))
    index = mx.broadcast_to(index, (batch, n_heads, length, m))
    return keys, values, mx.take_along_axis(mask, index, axis=3)


def _merge(alive: mx.array, mask: mx.array | None, dtype: mx.Dtype) -> mx.array:
    if mask is None:
        return alive
    if mask.dtype == mx.bool_:
        return alive & mask
    return mx.where(alive, mask.astype(dtype), mx.array(-mx.inf, dtype))
