"""One layer's storage: keys and values in slots, and what is known of each.

A full layer has `max_size + 1` slots. The newest token is written into the slot of the
last victim, so an eviction moves nothing and costs one write. Knows where tokens are;
which is evicted is decided elsewhere. Shapes as in `fields`.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from .device import kernels_wanted
from .entries import (
    Entries,
    after,
    dequantized,
    each,
    first_slots,
    gather,
    join,
    pad,
    to_mlx,
)
from .fields import (
    PER_SLOT,
    norms_of,
    position_range,
    positions_by_age,
    slots_to_allocate,
)
from .formats import Storage
from .journal import Renumbered
from .logged_slots import LoggedSlots

# Behind every position.
LAST = 2**31 - 1


class Slots(LoggedSlots):
    """The slots of one layer: `logged_slots.LoggedSlots`, written and moved.

    Attributes:
        shift: how far the next token's rotary position is behind its index.
        written: the slot of the newest token, if the rule evicts by age and there is a
            victim.
        victim: as in `SlotFields`; None: the next slot to write is `size()`.
    """

    shift = written = 0

    @property
    def evicted(self) -> bool:
        """Whether a token was evicted."""
        return self.offset > self.size()

    @property
    def newest_of_rows(self) -> list[int]:
        """The position of the newest token, for each row of the batch."""
        return [self.newest] * self.keys.shape[0]

    @property
    def taken(self) -> int:
        """Slots in use, the victim's included."""
        return self.size() + (self.victim is not None)

    @property
    def held(self) -> mx.array | None:
        """Which of the slots attended to hold a token, bool [B, 1, S]; None: all."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the journal's included, but for an archive's."""
        others = sum(a.nbytes for a in self.journal.arrays)
        return super().nbytes + others + (self.recall.nbytes if self.recall else 0)

    def append(
        self, keys: mx.array, values: mx.array, *, settle: bool = True
    ) -> tuple[Entries, Entries]:
        """Write one token, or several that evict nothing; return all entries held.

        settle: whether what is known of it is written too, or left to the caller.
        """
        start, length = self.size(), keys.shape[2]
        n = start + length
        if self.victim is None:
            self._reserve(n, keys, values)
        self._log_scores()
        self._log_victim()
        slot = self._next_slot(length)
        new = self._positions(keys, self.offset, length)
        self.write_tokens(slot, keys, values, new, self.shift)
        if settle:
            self.settle()
        self.offset += length
        if self.evicted and self.rule.by_age:
            self.count_positions()
        elif self.evicted and self.positions is None:
            self.positions = self._positions(self.keys, 0, n)
        return first_slots(self.keys_to_read, n), first_slots(self.values, n)

    def _next_slot(self, length: int) -> mx.array | int:
        """Where the next tokens go, as `entries.write` takes it."""
        if self.rule.by_age:
            slot = self.size()
            if self.victim is not None:
                slot = self.slot_after(self.written)
            self.written = slot + length - 1
            return slot
        if self.victim is None:
            return self.size()
        # On the CPU a slice is the faster. On Metal one whose place only the device
        # knows takes two launches, and a scatter takes one.
        one = self.victim.size == 1 and not kernels_wanted()
        return self.victim.reshape(1) if one else self.victim

    def extend(self, keys: Any, values: Any) -> tuple[Entries, Entries]:
        """Put a block of tokens after those held, in order of position, for `keep`.

        Until then there are more slots than the limit and `scores` has none for the
        new tokens.
        """
        self._log_victim()
        length = keys.shape[2]
        new = {
            "positions": self._positions(keys, self.offset, length),
            "value_norms": norms_of(values) if self.rule.value_weighted else None,
        }
        for name in ("rotary", "stored_rotary"):
            there = getattr(self, name) is not None
            new[name] = new["positions"] - self.shift if there else None
        new["keys"], new["values"] = self.storage.store(keys, values)
        if self.offset:
            order, positions = self.order(), self.held_positions()
            for name, entries in new.items():
                before = positions
                if name != "positions":
                    before = self._held(getattr(self, name), order)
                new[name] = None if entries is None else join([before, entries])
            self.scores = self._held(self.scores, order)
        else:
            self.scores = None
        for name, entries in new.items():
            setattr(self, name, entries)
        self.victim = None
        self.offset += length
        return self.keys_to_read, self.values

    def keep(self, columns: mx.array) -> None:
        """Move the tokens still held, columns [B, H', size()], into the first slots."""
        size = self.size()
        # The free slots' contents are never read; any column will do.
        columns = pad(
            columns, 0, slots_to_allocate(size + 1, self.rule.max_size) - size
        )
        # With the journal's entries, or they would keep all columns alive until read.
        logged = self.journal.arrays
        if self.recall is not None:
            logged += self.recall.arrays
        self.keys = after(gather(self.keys, columns), logged)
        self.values = after(gather(self.values, columns), logged)
        for name in PER_SLOT[4:]:
            if (array := getattr(self, name)) is not None:
                setattr(self, name, gather(array, columns))
        self.positions = gather(self.positions, columns) if self.evicted else None

    def mark(self, victim: mx.array, scores: mx.array | None = None) -> None:
        """Mark the slot [B, H', 1] of the token that is evicted now.

        scores: those of all slots, [B, H', S], if the rule has any.
        """
        self.victim = victim
        if self.observer:
            own = None
            if scores is not None and self.observer.wants_scores:
                own = gather(scores, victim)
            self.observer.evicted([self.newest], gather(self.positions, victim), own)

    def mark_oldest(self) -> None:
        """Mark the oldest token that is not protected, of a rule that evicts by age."""
        batch = self.keys.shape[0]
        slot = self.slot_after(self.written)
        self.mark(to_mlx(np.full((batch, 1, 1), slot, np.uint32)))

    def _positions_by_age(self) -> mx.array:
        batch, n = self.keys.shape[0], self.keys.shape[2]
        row = positions_by_age(self.rule, n, self.newest, self.written)
        return to_mlx(np.broadcast_to(row, (batch, 1, n)))

    @property
    def next_rotary(self) -> int:
        """The rotary position of the next token."""
        return self.offset - self.shift

    def stored_in(self, storage: Storage) -> "Slots":
        """Return plain slots in another format, and with an empty journal."""
        if self.keys is not None:
            storage = storage.fitted(*map(dequantized, self.held_entries()))
        twin = self.twin()
        twin.storage, twin.journal = storage, self.journal.empty()
        if twin.keys is not None:
            twin.keys, twin.values = storage.store(twin.keys, twin.values)
            twin.stored_rotary = twin.rotary if twin.keeps_stored else None
        return twin

    def empty(self) -> None:
        """Hold nothing, as when new; whoever observes goes on."""
        new = Slots(
            self.rule,
            self.journal.length,
            self.storage,
            self.renumbering,
            self.recall and self.recall.empty(),
        )
        new.observer = self.observer
        self.__dict__ = vars(new)

    @property
    def tied_to(self) -> list[mx.array]:
        return self.recall.tied_to if self.recall is not None else []

    def next_cut(self, offset: int) -> int | None:
        """Return how many tokens are seen when `do_scheduled` has something to do."""
        if self.renumbering is not None:
            return self.renumbering.next_after(offset)
        return None if self.recall is None else self.recall.next_cut(offset)

    def do_scheduled(self) -> bool:
        """Do what is due after as many tokens; return whether any key was changed."""
        if self.recall is not None and self.evicted:
            self.recall = self.recall.flushed(self.offset)
        return self.renumber()

    def renumber(self) -> bool:
        """If it is time to, give the tokens held the rotary positions 0, 1, 2 …"""
        when = self.renumbering
        if when is None or not self.evicted or not when.is_due(self.offset):
            return False
        assert self.positions is not None
        order = self.order()
        before = self._held(self.rotary, order)
        positions = self._held(self.positions, order)
        self.journal = self.journal.with_renumbered(
            Renumbered(
                self.newest,
                self.shift,
                positions,
                positions if before is None else before,
            )
        )
        if self.victim is None:
            # They lie in order. Past them nothing is read.
            number = self._positions(self.keys, 0, self.positions.shape[2])
        else:
            number = mx.argsort(_by_age(self.positions, self.victim), axis=-1)
            # The victim is not one of them, and may be taken back as it was.
            there = self.positions if self.rotary is None else self.rotary
            is_victim = mx.arange(number.shape[2]) == self.victim
            number = mx.where(is_victim, there, number)
        self.rotate(number.astype(mx.int32))
        self.shift = self.offset - self.size()
        return True

    def remember(self, scores: mx.array) -> None:
        """Store the scores [B, H', n] of the first n slots, if the rule has memory."""
        if self.rule.memory:
            self.scores = pad(scores, 0, self.keys.shape[2] - scores.shape[2])

    def held_positions(self) -> mx.array:
        """The positions of the tokens held, int32 [B, H', size()], ascending."""
        if self.keys is None:
            return mx.zeros((1, 1, 0), mx.int32)
        if self.positions is None:
            return self._positions(self.keys, 0, self.size())
        return self._held(self.positions, self.order())

    def held_entries(self) -> tuple[Entries, Entries]:
        """Keys and values held, in the order of `held_positions`."""
        order = self.order()
        return self._held(self.keys_to_read, order), self._held(self.values, order)

    def _positions(self, keys: Any, start: int, n: int) -> mx.array:
        return position_range(keys.shape[0], self.eviction_heads(keys), start, n)

    def _reserve(self, n: int, keys: mx.array, values: mx.array) -> None:
        """Allocate slots for n tokens; keys and values: the new ones, for shapes."""
        there = 0 if self.keys is None else self.keys.shape[2]
        if n <= there:
            return
        batch, n_kv_heads = keys.shape[:2]
        if self.keys is None:
            heads, rule = self.eviction_heads(keys), self.rule
            none = self.storage.store(keys[:, :, :1], values[:, :, :1])
            self.keys, self.values = (each(lambda a: a[:, :, :0], e) for e in none)
            if rule.memory:
                self.scores = mx.zeros((batch, heads, 0))
            if rule.value_weighted:
                self.value_norms = mx.zeros((batch, n_kv_heads, 0))
        spare = slots_to_allocate(n, self.rule.max_size) - there
        for name in PER_SLOT:
            if (entries := getattr(self, name)) is not None:
                setattr(self, name, pad(entries, 0, spare))

    def order(self) -> mx.array | None:
        """Slots held in order of position [B, H', size()]; None: the first ones."""
        if self.victim is None:
            return None
        return in_order(self.positions, self.victim, self.size())

    def _held(self, entries: Any, order: mx.array | None) -> Any:
        if order is None or entries is None:
            return first_slots(entries, self.size())
        return gather(entries, order)


def in_order(positions: Any, victim: mx.array, n: int) -> mx.array:
    """The first n slots in order of position, the victim's left out."""
    return _by_age(positions, victim)[..., :n]


def _by_age(positions: Any, victim: mx.array) -> mx.array:
    """All slots in order of position, the victim's last."""
    slots = mx.arange(positions.shape[2])
    positions = mx.where(slots == victim, LAST, positions)
    return mx.argsort(positions, axis=-1)
