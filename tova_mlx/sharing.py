"""Layers that attend to another layer's keys and values.

Only the owner evicts. The others, which come later in the same pass, see what the owner
saw: the arrays that its update gave, and who was alive for each row.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from .newest import plain_attention
from .packed import Rows


class Given:
    """What a cache gave to its owner in the last update, if others share it."""

    def __init__(self) -> None:
        self.shares = False
        self.rows: tuple[Rows, Rows] | None = None
        # How others attend to them, if a mask does not say it.
        self._again: Callable[..., mx.array] = plain_attention

    def start(self) -> None:
        self.shares = True
        _sharing.add(self)

    def note(self, rows: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
        if self.shares:
            self.rows = rows
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
        self.rows, self._again = None, plain_attention

    def __deepcopy__(self, memo: Any) -> "Given":
        # Not the arrays: a copy has given nothing yet.
        twin = Given()
        if self.shares:
            twin.start()
        return twin


def given_with(keys: Any) -> Given | None:
    """What was given together with these very keys, if they are shared."""
    return next((g for g in _sharing if g.rows and g.rows[0] is keys), None)


# A layer without a cache finds its owner here.
_sharing: WeakSet[Given] = WeakSet()
