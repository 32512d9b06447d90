"""Layers that attend to another layer's keys and values.

Only the owner evicts. The others, which come later in the same pass, see what the owner
saw: the arrays that its update gave, and who was alive for each row.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import mlx.core as mx

from ..storage.packed import Rows
from .softmax import plain_attention


class Given:
    """What a cache gave to its owner in the last update, if others share it."""

    def __init__(self, shares: bool = False) -> None:
        self.shares = shares
        self.rows: tuple[Rows, Rows] | None = None
        # How others attend to them, if a mask does not say it.
        self._again: Callable[..., mx.array] = plain_attention

    def note(self, rows: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
        if self.shares:
            self.rows = rows
            _by_keys[id(rows[0])] = self
        return rows

    def note_again(self, again: Callable[..., mx.array]) -> None:
        """With what others attend, `attend`'s arguments in, its output out."""
        if self.shares:
            self._again = again

    def attend(
        self, queries: mx.array, keys: Rows, values: Rows, **how: Any
    ) -> mx.array:
        """Attention of another layer; `how`: scale, mask and sinks. Evicts nothing."""
        return self._again(queries, keys, values, **how)

    def forget(self) -> None:
        if self.rows is not None:
            _by_keys.pop(id(self.rows[0]), None)
        self.rows, self._again = None, plain_attention

    def __deepcopy__(self, memo: Any) -> "Given":
        # Not the arrays: a copy has given nothing yet.
        return Given(self.shares)

    def __reduce__(self) -> Any:
        return Given, (self.shares,)


def given_with(keys: Any) -> Given | None:
    """What was given together with these very keys, if they are shared."""
    given = _by_keys.get(id(keys))
    # An id may be that of other keys by now.
    return given if given and given.rows and given.rows[0] is keys else None


# A layer without a cache finds its owner here, by the id of the keys. One entry is one
# operation, so threads do not get into each other's way.
_by_keys: WeakValueDictionary[int, Given] = WeakValueDictionary()
