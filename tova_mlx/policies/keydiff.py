"""keydiff: keeps the keys that are least like the mean key.

Reads no attention, only the keys: a token's score is minus the cosine of its key's
angle to the mean of all unit keys held, per KV head by default. Nothing is protected.

Source: KeyDiff, arXiv 2504.15364, section 3.
Differs from the source: exact token by token during prefill, where the released code
cuts once a block; the mean over the KV heads with granularity "layer".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .base import Policy, Rule

if TYPE_CHECKING:
    import mlx.core as mx


class Directions(NamedTuple):
    """Unit keys, as what they are apart from a vector near all of them.

    Where a model's keys share a large constant all cosines are almost 1, and float32
    has few digits for what tells them apart; their differences keep theirs.
    """

    apart: mx.array  # [B, n_kv_heads, S, head_dim]
    squares: mx.array  # [B, n_kv_heads, S], squared lengths of `apart`
    directed: mx.array  # bool, the same shape: False for a key of length 0
    centre: mx.array  # [B, n_kv_heads, 1, head_dim]


def prepare(keys: mx.array, values: mx.array) -> tuple[Directions, mx.array]:
    """Turn keys into directions."""
    import mlx.core as mx

    lengths = mx.linalg.norm(keys, axis=-1, keepdims=True)
    directed = lengths > 0
    units = keys * mx.where(directed, 1 / lengths, 0.0)
    centre = units.mean(axis=2, keepdims=True)
    apart = units - centre
    squares = apart.square().sum(axis=-1)
    return Directions(apart, squares, directed[..., 0], centre), values


def score(
    keys: Directions, values: mx.array, positions: mx.array, held: mx.array
) -> mx.array:
    """Return minus the cosines to the mean unit key m, up to a constant of each head.

    From the distance of a unit key u to m: -cos = (|u - m|² - 1 - |m|²) / 2|m|.
    """
    import mlx.core as mx

    counted = (keys.directed & held).astype(mx.float32)
    n = mx.maximum(counted.sum(axis=-1, keepdims=True), 1)
    shift = (counted / n)[:, :, None] @ keys.apart
    along = (shift @ keys.apart.swapaxes(2, 3))[:, :, 0]
    distances = keys.squares - 2 * along + shift.square().sum(axis=-1)
    square = (keys.centre + shift).square().sum(axis=-1)
    # A key of length 0 has a cosine of 0.
    distances = mx.where(keys.directed, distances, 1 + square)
    length = mx.sqrt(square)
    return mx.where(length > 0, distances / (2 * length), 0.0)


def score_on_gpu(keys: mx.array, held: mx.array | None) -> mx.array:
    """Return the scores of keys [B, n_kv_heads, S, head_dim], see `score`."""
    from .keydiff_kernel import scores_on_gpu

    return scores_on_gpu(keys, held)


def scan_on_gpu(
    keys: Directions, positions: mx.array, rule: Rule, **how: int
) -> mx.array | None:
    """Return until when each column is held, see `Policy`; None: too many columns."""
    from .keydiff_kernel import evictions_on_gpu, fits

    if not fits(keys.squares.shape):
        return None
    return evictions_on_gpu(keys, positions, rule, **how)


KEYDIFF = Policy(
    name="keydiff",
    keeps="the keys least similar to the mean key",
    source="KeyDiff, arXiv 2504.15364",
    granularity="head",
    prepare=prepare,
    score=score,
    score_on_gpu=score_on_gpu,
    scan_on_gpu=scan_on_gpu,
)
