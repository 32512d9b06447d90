"""Attention of a block of new rows, with evictions between the rows.

One matmul for the logits, the scan for who was alive, one masked attention for the
outputs. Long chunks are cut into blocks and the dead columns dropped between them, so
that logits stay small and attention costs rows x (max_size + block).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .eviction import ScanResult, scan
from .logits import masked_logits
from .newest import BLOCK, plain_attention
from .packed import Rows, gather, to_mlx
from .policies import Rule
from .slots import Slots


class BlockResult(NamedTuple):
    """Output [B, n_heads, L, head_dim], and what became of the columns.

    survivors: int32 [B, H', kept] and their scores; gone: the columns that left, in
    order of step [B, H', n]; before: the scores [B, H', n] of those held before each
    of the last rows, in order of position (rules with memory).
    """

    output: mx.array
    survivors: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]
    gone: np.ndarray[Any, Any]
    before: list[np.ndarray[Any, Any]]
    blocks: list["Block"]


class Block(NamedTuple):
    """Rows start to stop, the columns they may see, and who was alive for each.

    columns: int32 [B, H', m]; is_first: they are the first m; alive: bool
    [B, H', rows, m], None until scanned.
    """

    start: int
    stop: int
    columns: np.ndarray[Any, Any]
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
    positions: np.ndarray[Any, Any],
    scores: np.ndarray[Any, Any] | None,
    norms: np.ndarray[Any, Any] | None,
    rule: Rule,
    cut_once: bool,
    n_before: int,
) -> BlockResult:
    """Outputs and survivors of L rows over the columns held plus their own.

    queries: [B, n_heads, L, D]; keys, values: [B, n_kv_heads, N, D], N = held + L, in
    order of position; positions: int32 [B, H', N]; scores: float32 [B, H', held];
    norms: float32 [B, n_kv_heads, N]. "causal" is what a row may look at if the mask
    is no array; n_before: for how many of the last rows `gone` and `before` are wanted.
    """
    batch, n_heads, length, _ = queries.shape
    n_columns = keys.shape[2]
    choosers = positions.shape[1]
    held = n_columns - length
    living = np.broadcast_to(np.arange(held, dtype=np.int32), (batch, choosers, held))
    living_scores = np.zeros((batch, choosers, held), np.float32)
    if scores is not None:
        living_scores = scores
    learned = None if sinks is None else np.array(sinks.astype(mx.float32))
    outputs, gone, before, blocks = [], [], [], []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        own = np.arange(held + start, held + stop, dtype=np.int32)
        own = np.broadcast_to(own, (batch, choosers, stop - start))
        columns = np.concatenate([living, own], axis=2)
        m = columns.shape[2]
        block = Block(start, stop, columns, m == held + stop)
        rows = queries[:, :, start:stop]
        seen = _cut(block, keys, values, mask, n_heads)
        logits = masked_logits(rows, seen[0], scale, seen[2])
        logits = mx.where(_causal(stop - start, m), logits, -mx.inf)
        flat = (batch * choosers, m)
        result = scan(
            np.array(logits, copy=False),
            np.take_along_axis(positions, columns, axis=2).reshape(flat),
            np.pad(living_scores, [(0, 0), (0, 0), (0, stop - start)]).reshape(flat),
            None if norms is None else _take(norms, columns),
            rule,
            limit=None if cut_once and stop < length else rule.max_size,
            cut_once=cut_once,
            sinks=learned,
        )
        kept = result.survivors.reshape(batch, choosers, -1)
        living = np.take_along_axis(columns, kept, axis=2)
        living_scores = result.scores.reshape(kept.shape)
        if n_before:
            left = result.gone.reshape(batch, choosers, -1)
            gone.append(np.take_along_axis(columns, left, axis=2))
        if rule.memory and n_before:
            before += [
                b.reshape(batch, choosers, -1) for b in _before(result, n_before)
            ]
        alive = to_mlx(result.alive.reshape(batch, choosers, stop - start, m))
        blocks.append(block._replace(alive=alive))
        outputs.append(_attend(queries, *seen, blocks[-1], scale, sinks))
    return BlockResult(
        _joined(outputs),
        living,
        living_scores,
        np.concatenate(gone, axis=2) if gone else living[..., :0],
        before[-n_before:] if n_before else [],
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
        seen = _cut(block, keys, values, mask, queries.shape[1])
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


def _before(result: ScanResult, n_rows: int) -> Iterator[np.ndarray[Any, Any]]:
    """The scores [R, n] of the columns alive before each of the last rows."""
    rows, length, columns = result.alive.shape
    for i in range(max(0, length - n_rows), length):
        # Not yet alive: the row's own column and those after it.
        living = result.alive[:, i, : columns - length + i]
        held = np.nonzero(living)[1].reshape(rows, -1)
        yield np.take_along_axis(result.before[i], held, axis=1)


def _causal(length: int, columns: int) -> mx.array:
    return mx.arange(columns - length, columns)[:, None] >= mx.arange(columns)


def _cut(
    block: Block,
    keys: Rows,
    values: Rows,
    mask: mx.array | str | None,
    n_heads: int,
) -> tuple[Rows, Rows, mx.array | None]:
    """Keys, values and the model's mask [B, n_heads, L, N], cut to a block."""
    columns = block.columns
    batch, choosers, m = columns.shape
    if block.is_first:
        keys, values = Slots.first(keys, m), Slots.first(values, m)
    else:
        keys, values = gather(keys, columns), gather(values, columns)
    if not isinstance(mask, mx.array):
        return keys, values, None
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    mask = mask[:, :, block.start : block.stop]
    if block.is_first:
        return keys, values, mask[..., :m]
    index = to_mlx(np.repeat(columns, n_heads // choosers, axis=1))[:, :, None]
    length, n_columns = mask.shape[2:]
    mask = mx.broadcast_to(mask, (batch, n_heads, length, n_columns))
    index = mx.broadcast_to(index, (batch, n_heads, length, m))
    return keys, values, mx.take_along_axis(mask, index, axis=3)


def _merge(alive: mx.array, mask: mx.array | None, dtype: mx.Dtype) -> mx.array:
    if mask is None:
        return alive
    if mask.dtype == mx.bool_:
        return alive & mask
    return mx.where(alive, mask.astype(dtype), mx.array(-mx.inf, dtype))


def _take(norms: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]) -> Any:
    shape = (*norms.shape[:2], columns.shape[2])
    return np.take_along_axis(norms, np.broadcast_to(columns, shape), axis=2)
