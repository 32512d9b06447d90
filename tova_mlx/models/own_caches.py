"""mlx-lm's own caches out of a file: can they have been in use?

mlx-lm takes any state for one. Knows nothing of ours, which check themselves.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from ..storage.affine import Affine
from ..storage.entries import Entries
from ..storage.state_entries import check_finite, from_arrays, is_count

# What `QuantizedKVCache` can have, as MLX's quantisation.
_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def check_own(cache: Any) -> None:
    """Raise ValueError, TypeError for a cache of mlx-lm that no prompt leaves."""
    kind = type(cache)
    if kind is mlx_lm_cache.CacheList:
        if not cache.caches:
            raise ValueError("a list of no caches")
    elif kind is mlx_lm_cache.ArraysCache:
        _check_arrays(cache)
    elif kind in _HELD:
        if cache.keys is None or cache.values is None:
            _check_empty(cache)
        else:
            _HELD[kind](cache)
    else:
        raise ValueError(f"{kind.__name__} is no cache of a prompt")


def _check_empty(cache: Any) -> None:
    if cache.keys is not None or cache.values is not None or cache.offset:
        raise ValueError(f"{cache.offset!r} tokens without keys or values")


def _check_plain(cache: Any) -> None:
    _check_slots(cache, cache.offset)


def _check_chunked(cache: Any) -> None:
    first = cache.start_position
    if not (is_count(first) and is_count(cache.offset) and is_count(cache.chunk_size)):
        raise ValueError("a chunk that is not of tokens")
    _check_slots(cache, cache.offset - first)


def _check_quantised(cache: Any) -> None:
    how = (cache.bits, cache.group_size)
    if not all(map(is_count, how)) or how[0] not in _BITS or how[1] not in _GROUPS:
        raise ValueError(f"{cache.bits!r} bits in groups of {cache.group_size!r}")
    form = Affine(cache.bits, cache.group_size)
    keys, values = (form.from_state(e) for e in (cache.keys, cache.values))
    _check_entries(keys, values, cache.offset)


def _check_rotating(cache: Any) -> None:
    counts = (cache.offset, cache.keep, cache.max_size, cache._idx)
    if not all(map(is_count, counts)) or cache.keep >= cache.max_size:
        raise ValueError(f"a window of {counts}")
    n = cache.keys.shape[2] if isinstance(cache.keys, mx.array) else 0
    _check_slots(cache, min(cache.offset, n))
    # The newest token goes round once all slots are taken.
    written = cache._idx == cache.offset if cache.offset <= n else cache._idx <= n
    if not written or (cache.offset > n and n < cache.max_size):
        raise ValueError(f"a window of {counts} in {n} slots")


def _check_arrays(cache: Any) -> None:
    if not isinstance(cache.cache, list) or not cache.cache:
        raise ValueError("no list of arrays")
    for array in (*cache.cache, cache.left_padding, cache.lengths):
        if array is not None and not isinstance(array, mx.array):
            raise ValueError("a list that is not of arrays")
    for array in cache.cache:
        if array is not None and not mx.isfinite(array).all().item():
            raise ValueError("arrays that are not of numbers")


def _check_slots(cache: Any, n: Any) -> None:
    keys, values = (from_arrays(e, None) for e in (cache.keys, cache.values))
    _check_entries(keys, values, n)


def _check_entries(keys: Entries, values: Entries, n: Any) -> None:
    """Check entries of as many slots, of which the first n are read."""
    if values.shape[:3] != keys.shape[:3] or 0 in keys.shape:
        raise ValueError(f"keys {keys.shape}, values {values.shape}")
    if not is_count(n) or n > keys.shape[2]:
        raise ValueError(f"{keys.shape[2]} slots for {n!r} tokens")
    check_finite(keys, n)
    check_finite(values, n)


_HELD = {
    mlx_lm_cache.KVCache: _check_plain,
    mlx_lm_cache.ChunkedKVCache: _check_chunked,
    mlx_lm_cache.ConcatenateKVCache: _check_plain,
    mlx_lm_cache.QuantizedKVCache: _check_quantised,
    mlx_lm_cache.RotatingKVCache: _check_rotating,
}
