"""Notices that the layers of a model have not seen the same tokens.

A forward that was interrupted leaves some layers ahead of others, and nothing in one
layer's cache shows it: the next forward would go on, silently wrong.
"""

from collections.abc import Iterable
from typing import Any
from weakref import ReferenceType, ref

from ..errors import CacheStateError
from ..hooks.layers import leaves


class Lockstep:
    """What the caches of one model share, so that each can see where the others are.

    In a forward every cache is updated at the offset at which the first one was. Caches
    that a model never uses are never asked.
    """

    def __init__(self) -> None:
        self._first: ReferenceType[Any] | None = None
        self._offset = 0

    def enter(self, cache: Any) -> None:
        """Before an update of one of the caches. Raises CacheStateError."""
        first = self._first() if self._first is not None else None
        if first is None or first is cache:
            self._first, self._offset = ref(cache), cache.seen
        elif cache.seen != self._offset:
            behind = first.seen - cache.seen
            how = (
                f"Take back with trim_prompt_cache(cache, {behind}), or start"
                if behind > 0
                else "Start"
            )
            raise CacheStateError(
                f"{cache.rule.policy}: a layer has seen {cache.seen} tokens where "
                f"the first one of its model had seen {self._offset}, so a forward was "
                f"interrupted. {how} with new caches."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Lockstep":
        twin = Lockstep()
        first = self._first() if self._first is not None else None
        # Copied alone, a cache has no others to be in step with.
        if first is not None and id(first) in memo:
            twin._first, twin._offset = ref(memo[id(first)]), self._offset
        return twin

    def __reduce__(self) -> Any:
        return Lockstep, ()


def keep_together(caches: Iterable[Any]) -> None:
    """Let the caches of one model watch each other."""
    together = Lockstep()
    for cache in leaves(caches):
        if hasattr(cache, "lockstep"):
            cache.lockstep = together
