"""Somebody who wants to know which tokens a layer evicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

# Called with the steps (positions of the tokens after which they were evicted), one
# for each, and the positions evicted, int32 [B, H', n].
Callback = Callable[[Sequence[int], mx.array], Any]


class Observer:
    """Calls somebody, or nobody. A copy of a cache has nobody."""

    def __init__(self, callback: Callback | None = None):
        self.callback = callback

    def __bool__(self) -> bool:
        return self.callback is not None

    def evicted(self, steps: Sequence[int], positions: mx.array) -> None:
        if self.callback is not None:
            self.callback(steps, positions)

    def __deepcopy__(self, memo: Any) -> Observer:
        return Observer()

    def __reduce__(self) -> Any:
        return Observer, ()
