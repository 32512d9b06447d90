"""Layers that attend to another layer's keys and values.

Only the owner evicts. The others, which come later in the same pass, see what the owner
saw: the arrays that its update gave, and which tokens were held for each query.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import mlx.core as mx

from ..storage.entries import Entries
from .arguments import AttentionArgs
from .softmax import plain_attention

Attend = Callable[[mx.array, Entries, Entries, AttentionArgs], mx.array]


class Shared:
    """What a cache gave to its owner in the last update, if others share it."""

    def __init__(self, shares: bool = False) -> None:
        self.shares = shares
        self.entries: tuple[Entries, Entries] | None = None
        # How others attend to them, if a mask does not say it.
        self._attend: Attend = plain_attention

    def give(self, entries: tuple[Entries, Entries]) -> tuple[Entries, Entries]:
        """Note what an update gives, and return it."""
        if self.shares:
            self.entries = entries
            _by_keys[id(entries[0])] = self
        return entries

    def attend_with(self, attend: Attend) -> None:
        """Let others attend to what was given with this function."""
        if self.shares:
            self._attend = attend

    def attend(
        self,
        queries: mx.array,
        keys: Entries,
        values: Entries,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention of another layer, as `PolicyKVCache.attend`. Evicts nothing."""
        return self._attend(queries, keys, values, AttentionArgs(scale, mask, sinks))

    def forget(self) -> None:
        if self.entries is not None:
            _by_keys.pop(id(self.entries[0]), None)
        self.entries, self._attend = None, plain_attention

    def __deepcopy__(self, memo: Any) -> "Shared":
        # Not the arrays: a copy has given nothing yet.
        return Shared(self.shares)

    def __reduce__(self) -> Any:
        return Shared, (self.shares,)


def shared_with(keys: Any) -> Shared | None:
    """Return what was given together with these very keys, if they are shared."""
    shared = _by_keys.get(id(keys))
    # An id may be that of other keys by now.
    return shared if shared and shared.entries and shared.entries[0] is keys else None


# A layer without a cache finds its owner here, by the id of the keys. One entry is one
# operation, so threads do not get into each other's way.
_by_keys: WeakValueDictionary[int, Shared] = WeakValueDictionary()
