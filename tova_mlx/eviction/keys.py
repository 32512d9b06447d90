"""Who leaves by the keys alone: in a step, and replayed over a block.

A key's score is minus the cosine of its angle to the mean of the unit keys held. Where
a model's keys share a large constant all cosines are almost 1, and float32 has few
digits for what tells them apart. So the score is taken from the distance of a unit key
u to the mean m, the same but for a constant: -cos = (|u - m|² - 1 - |m|²) / 2|m|.
"""

from typing import NamedTuple

import mlx.core as mx

from ..policies import Rule
from ..storage.packed import Rows, unpacked
from .scan import ScanResult
from .step import choose_victim


class Directions(NamedTuple):
    """Unit keys, as what they are apart from a vector near all of them.

    centre: float32 [B, n_kv_heads, 1, head_dim]; apart: [B, n_kv_heads, S, head_dim];
    squares: [B, n_kv_heads, S], squared lengths of `apart`; counts: the same shape, 0
    for a key of length 0, which has no direction.
    """

    centre: mx.array
    apart: mx.array
    squares: mx.array
    counts: mx.array


def directions(keys: Rows) -> Directions:
    """Those of keys [B, n_kv_heads, S, head_dim], as they are stored."""
    plain = unpacked(keys)
    norms = mx.linalg.norm(plain, axis=-1)
    counts = (norms > 0).astype(mx.float32)
    units = plain * mx.where(norms > 0, 1 / norms, 0.0)[..., None]
    total = mx.maximum(counts.sum(axis=2, keepdims=True), 1)[..., None]
    centre = units.sum(axis=2, keepdims=True) / total
    apart = units - centre
    return Directions(centre, apart, apart.square().sum(axis=-1), counts)


def key_scores(keys: Directions, rule: Rule, alive: mx.array | None = None) -> mx.array:
    """Float32 [B, H', S], higher = keep, up to a constant of each H'.

    alive: bool [B, H', S], those that count, all if None.
    """
    mean, squares = keys.centre, keys.squares
    if alive is not None:
        counted = keys.counts * alive
        total = mx.maximum(counted.sum(axis=2, keepdims=True), 1)
        shift = (counted / total)[:, :, None] @ keys.apart
        along = (shift @ keys.apart.swapaxes(2, 3))[:, :, 0]
        squares = squares - 2 * along + shift.square().sum(axis=-1)
        mean = mean + shift
    square = mean.square().sum(axis=-1)
    length = mx.sqrt(square)
    # A key of length 0 has a cosine of 0.
    distance = mx.where(keys.counts > 0, squares, 1 + square)
    scores = mx.where(length > 0, distance / (2 * length), 0.0)
    return scores if rule.per_head else scores.mean(axis=1, keepdims=True)


def scan_keys(
    keys: Rows,
    positions: mx.array,
    rule: Rule,
    *,
    limit: int | None,
    n_rows: int,
) -> ScanResult:
    """As `scan_on_cpu`, for the last `n_rows` of the columns; evaluated.

    positions: int32 [R, N]. A block's graph is thousands of small operations, too much
    to be left waiting for all layers at once.
    """
    batch, n_columns = keys.shape[0], keys.shape[2]
    n_held = n_columns - n_rows
    places = positions.reshape(batch, -1, n_columns)
    turned = directions(keys)
    columns = mx.arange(n_columns)
    alive = mx.broadcast_to(columns < n_held, places.shape)
    last = mx.full(places.shape, n_rows, mx.int32)
    for row in range(n_rows):
        own = n_held + row
        alive = alive | (columns == own)
        if limit is None or own + 1 <= limit:
            continue
        scores = key_scores(turned, rule, alive)
        newest = places[:, :, own : own + 1]
        victim = choose_victim(places, scores, newest, rule, alive)
        gone = columns == victim
        last, alive = mx.where(gone, row, last), alive & ~gone
    mx.eval(last)
    return ScanResult(last.reshape(positions.shape), mx.zeros(positions.shape), None)
