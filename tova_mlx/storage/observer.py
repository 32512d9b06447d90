"""Somebody who wants to know which tokens a layer evicts, and reads all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

# Called with the steps (positions of the tokens after which they were evicted), one
# for each, and the positions evicted, int32 [B, H', n]; with the scores that they were
# evicted with too, if those are wanted.
Callback = Callable[..., Any]
# Called with the steps (positions of the tokens that read) and the positions of the
# evicted that they attended to most, int32 [B, n_kv_heads, steps * slots], -1: none.
RecallCallback = Callable[[Sequence[int], mx.array], Any]


class Observer:
    """Calls somebody, or nobody. A copy of a cache has nobody.

    Args:
        callback: called for what is evicted.
        wants_scores: whether it takes the scores, float32 [B, H', n], None by age.
        recalled: called for what is attended to most of the evicted.
    """

    def __init__(
        self,
        callback: Callback | None = None,
        *,
        wants_scores: bool = False,
        recalled: RecallCallback | None = None,
    ):
        self.callback, self._recalled = callback, recalled
        self.wants_scores = callback is not None and wants_scores

    def __bool__(self) -> bool:
        return self.callback is not None

    @property
    def wants_recalled(self) -> bool:
        """Whether anybody asks what is read of the evicted."""
        return self._recalled is not None

    def evicted(
        self, steps: Sequence[int], positions: mx.array, scores: mx.array | None = None
    ) -> None:
        """Tell which tokens were evicted; scores: only read if they are wanted."""
        if self.callback is None:
            return
        if self.wants_scores:
            self.callback(steps, positions, scores)
        else:
            self.callback(steps, positions)

    def recalled(self, steps: Sequence[int], positions: mx.array) -> None:
        """Tell which evicted tokens each of the newest attended to most."""
        if self._recalled is not None:
            self._recalled(steps, positions)

    def __deepcopy__(self, memo: Any) -> Observer:
        return Observer()

    def __reduce__(self) -> Any:
        return Observer, ()
