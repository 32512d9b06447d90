"""Who leaves by the keys alone: in a step, and replayed over a block.

A key's score is minus the cosine of its angle to the mean of the unit keys held. Keys
may be packed; then the products read them as they are.
"""

import mlx.core as mx

from ..packed import Packed, Rows, product
from ..policies import Rule
from .scan import ScanResult
from .step import choose_victim


def key_scores(
    keys: Rows, norms: mx.array, rule: Rule, alive: mx.array | None = None
) -> mx.array:
    """Float32 [B, H', S], higher = keep.

    keys: [B, n_kv_heads, S, head_dim]; norms: float32 [B, n_kv_heads, S], their
    lengths; alive: bool [B, H', S], those that count, all if None.
    """
    inverse = mx.where(norms > 0, 1 / norms, 0.0)
    counted = inverse if alive is None else inverse * alive
    total = product(counted[:, :, None], keys, transpose=False)
    length = mx.linalg.norm(total, axis=-1)
    along = product(total, keys, transpose=True)[:, :, 0] * inverse
    scores = mx.where(length > 0, -along / length, 0.0)
    return scores if rule.per_head else scores.mean(axis=1, keepdims=True)


def scan_keys(
    keys: Rows,
    norms: mx.array,
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
    if not isinstance(keys, Packed):
        keys = keys.astype(mx.float32)
    columns = mx.arange(n_columns)
    alive = mx.broadcast_to(columns < n_held, places.shape)
    last = mx.full(places.shape, n_rows, mx.int32)
    for row in range(n_rows):
        own = n_held + row
        alive = alive | (columns == own)
        if limit is None or own + 1 <= limit:
            continue
        scores = key_scores(keys, norms, rule, alive)
        newest = places[:, :, own : own + 1]
        victim = choose_victim(places, scores, newest, rule, alive)
        gone = columns == victim
        last, alive = mx.where(gone, row, last), alive & ~gone
    mx.eval(last)
    return ScanResult(last.reshape(positions.shape), mx.zeros(positions.shape), None)
