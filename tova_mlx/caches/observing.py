"""Who is evicted, for whoever wants to see it: a viewer, an evaluation, a test."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

from ..hooks.layers import leaves
from .layer import PolicyKVCache


@contextmanager
def observe_evictions(
    caches: Iterable[Any],
    callback: Callable[..., Any],
    *,
    scores: bool = False,
    recalled: Callable[[int, Sequence[int], mx.array], Any] | None = None,
) -> Iterator[None]:
    """Call back for every eviction of these caches, for as long as the block runs.

    Args:
        caches: one cache per layer, as `make_prompt_cache` gives them; those that are
            not ours evict nothing that can be seen. Copies of them are not observed.
        callback: `callback(layer, steps, positions)`, after each step or block that
            evicts. layer: index in `caches`; steps: for each token evicted, the
            position of the token after which it was; positions: of the tokens evicted,
            int32 [B, H', n], not evaluated yet. H' is 1, or n_kv_heads with granularity
            "head". A cache in a batch has nobody to call.
        scores: call `callback(layer, steps, positions, scores)` instead; scores: what
            the policy ranked them with when they were evicted, float32 as positions,
            or None for a policy that goes by age. On Metal a prompt is read slower
            then: its kernels do not say them, so the portable scan is taken.
        recalled: called as `recalled(layer, steps, positions)` for what came back
            (`recall`): steps: positions of the tokens that read, one after the other;
            positions: of what each of them read again the `slots` that it attended to
            most, int32 [B, n_kv_heads, len(steps) * slots], -1 where there is nothing.

    Nothing is spent on it while nobody observes. A token that is taken back (`trim`)
    and read again is reported again.
    """
    layers = [
        (layer, cache)
        for layer, entry in enumerate(caches)
        for cache in leaves([entry])
        if isinstance(cache, PolicyKVCache)
    ]
    for layer, cache in layers:
        again = None if recalled is None else partial(recalled, layer)
        cache.observe(partial(callback, layer), scores=scores, recalled=again)
    try:
        yield
    finally:
        for _, cache in layers:
            cache.observe(None)
