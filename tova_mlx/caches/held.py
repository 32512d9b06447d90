"""What one layer's cache holds, and how much of it: the part that only reads."""

import mlx.core as mx

from ..errors import CacheStateError
from ..storage.entries import Entries
from ..storage.footprint import max_nbytes
from ..storage.slots import Slots
from .archived import Archived
from .base import PolicyCache


class HeldTokens(PolicyCache, Archived):
    """A cache of one layer, as who asks what is in it sees it.

    Attributes:
        seen: tokens seen.
        offset: the position of the next token, for rotary embeddings: `seen`, or less
            with positions that are renumbered.
    """

    _slots: Slots

    @property
    def max_size(self) -> int | None:
        """Tokens kept, those that are recalled included; None for no limit."""
        limit = self.rule.max_size
        return None if limit is None else limit + self.options.recall

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self._slots.offset + self._waiting

    @property
    def offset(self) -> int:
        """The rotary position of the next token: how many were seen, or fewer."""
        return self._slots.next_rotary + self._waiting

    @property
    def _waiting(self) -> int:
        """New tokens that are stored when they are attended to."""
        chunk = self._pending.chunk if self._pending is not None else None
        return 0 if chunk is None else chunk.length

    @property
    def values(self) -> Entries | None:
        """All slots [B, n_kv_heads, slots, head_dim], in no order; None if empty."""
        return self._slots.values

    def size(self) -> int:
        """Tokens held."""
        return self._slots.size()

    def empty(self) -> bool:
        return self._slots.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the cache, its journal and an archive in memory."""
        archived = 0 if self.archives_on_disk else self.archive_nbytes
        return self._slots.nbytes + archived

    @property
    def max_nbytes(self) -> int | None:
        """Bytes that the cache can reach; None if unlimited or still empty.

        An archive is not counted: it is not bounded.
        """
        return max_nbytes(self._slots)

    @property
    def positions(self) -> mx.array:
        """The index of the token in each slot held, int32 [B, H', size()].

        In ascending order, the order of `keys_and_values`. H' is 1, or n_kv_heads
        with granularity "head".
        """
        return self._slots.held_positions()

    def keys_and_values(self) -> tuple[Entries, Entries]:
        """Keys and values held [B, n_kv_heads, size(), head_dim], by position."""
        if self.empty():
            raise CacheStateError(
                "An empty cache has no keys. Run the model with it first."
            )
        if self._shared.entries is not None:
            # A layer that shares this one's keys attends to what this one attended to.
            return self._shared.entries
        return self._slots.held_entries()

    @property
    def journal(self) -> int:
        """How many of the newest tokens can be taken back after evictions."""
        return self._slots.journal.length

    @property
    def slots(self) -> Slots:
        """What is held, and where."""
        return self._slots
