"""One layer's storage: keys and values in slots, and what is known of each.

A full layer has `max_size + 1` slots. The newest token is written into the slot of the
last victim, so an eviction moves nothing and costs one write. Knows where tokens are;
which is evicted is decided elsewhere. Shapes as in `fields`.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from ..policies import Rule
from .archive import Rows
from .device import kernels_wanted
from .entries import (
    Entries,
    after,
    arrays_of,
    each,
    first_slots,
    gather,
    join,
    nbytes,
    pad,
    to_mlx,
)
from .fields import (
    PER_SLOT,
    SlotFields,
    norms_of,
    position_range,
    positions_by_age,
    slots_to_allocate,
    tokens_held,
)
from .formats import PLAIN, Storage
from .journal import Evicted, Journal, Renumbered, ScoresBefore
from .metal import take_slots
from .observer import Observer
from .recall import Recall
from .rotation import Renumbering

_LAST = 2**31 - 1


class Slots(SlotFields):
    """The slots of one layer: `fields.SlotFields`, and what has come and gone.

    Attributes:
        offset: tokens seen.
        shift: how far the next token's rotary position is behind its index.
        written: the slot of the newest token, if the rule evicts by age and there is a
            victim.
        victim: as in `SlotFields`; None: the next slot to write is `size()`.
        journal: what the last steps destroyed.
        observer: who wants to know what is evicted.
        recall: what of the evicted is brought back, or None.
    """

    def __init__(
        self,
        rule: Rule,
        journal: int = 0,
        storage: Storage = PLAIN,
        renumbering: Renumbering | None = None,
        recall: Recall | None = None,
    ):
        super().__init__(rule, storage, renumbering)
        self.offset = self.shift = self.written = 0
        self.journal, self.recall = Journal(journal), recall
        self.observer = Observer()

    def size(self) -> int:
        """Tokens held."""
        return tokens_held(self.offset, self.rule.max_size)

    @property
    def evicted(self) -> bool:
        """Whether a token was evicted."""
        return self.offset > self.size()

    @property
    def newest(self) -> int:
        """The position of the newest token."""
        return self.offset - 1

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

    @property
    def max_nbytes(self) -> int | None:
        """Bytes that the arrays can reach; None if unlimited or still empty."""
        limit = self.rule.max_size
        if limit is None or self.keys is None:
            return None
        batch, n_kv_heads, slots, _ = self.keys.shape
        per_token = (nbytes(self.keys) + nbytes(self.values)) // slots
        heads = batch * self.eviction_heads(self.keys)
        per_slot = per_token + 4 * batch * n_kv_heads * self.rule.value_weighted
        renumbered = 0
        if self.renumbering is not None:
            per_slot += 4 * heads * (1 + self.keeps_stored)
            if self.journal.length:
                times = 1 + self.journal.length // self.renumbering.period
                renumbered = 8 * heads * limit * times
        memory = bool(self.rule.memory)
        per_step = per_slot + 4 * heads
        if memory:
            per_step += 8 * heads * (limit + 1) + 4 * heads
        per_slot += 4 * heads * (1 + memory)
        slots = per_slot * (limit + 1) + 4 * heads
        if self.recall is not None:
            row = per_token + 4 * heads
            slots += self.recall.max_nbytes(row, self.keys)
        return slots + per_step * self.journal.length + renumbered

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

    @property
    def logs(self) -> bool:
        """Whether anybody asks which columns a block evicts."""
        return bool(self.journal.length or self.observer or self.recall)

    def log_evicted(
        self,
        columns: mx.array,
        *,
        once: bool = False,
        scores: mx.array | None = None,
    ) -> None:
        """Log the columns [B, H', n] that a block evicts, in order of step.

        Before `keep`; the last of them is evicted at the newest token's step. once:
        all are, and the journal cannot bring them back. scores: those that they were
        evicted with, for an observer who wants them.
        """
        n = columns.shape[2]
        if n and self.observer:
            steps = [self.newest] * n if once else range(self.offset - n, self.offset)
            self.observer.evicted(steps, gather(self.positions, columns), scores)
        if n and self.recall is not None:
            there = (self.keys, self.values, self.positions)
            self._log_for_recall(Rows(*(gather(e, columns) for e in there)))
        n = 0 if once else min(self.journal.length, n)
        if n:
            late = columns[..., -n:]
            there = self._to_log(self.positions)
            self._log([None if e is None else gather(e, late) for e in there])

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

    def can_take_back(self, n: int) -> bool:
        """Whether the newest n tokens can be taken back exactly."""
        to, limit = self.offset - n, self.rule.max_size
        if n <= 0 or to <= 0:
            return True
        if self.rule.memory and self.journal.scores_before(to) is None:
            return False
        if not self._can_rotate_back(to):
            return False
        if self.recall is not None and not self.recall.can_go_back(to, self.offset):
            return False
        evictions = 0 if limit is None else self.offset - max(to, limit)
        at_hand = len(self.journal.evicted_since(to)) + (self.victim is not None)
        return evictions <= at_hand

    def take_back(self, n: int) -> None:
        """Be as if the newest n tokens had not come; n <= 0 takes nothing back."""
        if n <= 0:
            return
        to = self.offset - n
        if to <= 0:
            new = Slots(
                self.rule,
                self.journal.length,
                self.storage,
                self.renumbering,
                self.recall and self.recall.empty(),
            )
            new.observer = self.observer
            self.__dict__ = vars(new)
            return
        if self.recall is not None:
            self.recall = self.recall.until(to)
        order = self._bring_back(to) if self.evicted else None
        self.offset, self.victim = to, None
        if order is not None:
            self.keep(order[..., : self.size()])
        if (before := self.journal.scores_before(to)) is not None:
            self.remember(_ordered_scores(before, self.size()))
        if (renumbered := self.journal.renumbered_since(to)) is not None:
            self._rotate_back(renumbered)
        self.journal = self.journal.until(to)

    @property
    def next_rotary(self) -> int:
        """The rotary position of the next token."""
        return self.offset - self.shift

    def _can_rotate_back(self, to: int) -> bool:
        """Whether the first renumbering that came after `to` tokens is known."""
        when, limit = self.renumbering, self.rule.max_size
        if when is None or limit is None:
            return True
        first = when.next_after(max(to, limit))
        known = self.journal.renumbered_since(to)
        return first > self.offset or (known is not None and known.step == first - 1)

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

    def _rotate_back(self, before: Renumbered) -> None:
        """Take a renumbering back, of the tokens that are held now."""
        assert self.rotary is not None
        positions = self.positions_of(self.keys.shape[2])
        now, then = (np.array(p) for p in (positions, before.positions))
        rotary, old = np.array(self.rotary), np.array(before.rotary)
        for place in np.ndindex(now.shape[:2]):
            found = np.searchsorted(then[place], now[place]).clip(max=then.shape[2] - 1)
            known = then[place][found] == now[place]
            # Others were evicted before it, so they have the positions of before.
            rotary[place] = np.where(known, old[place][found], rotary[place])
        self.rotate(to_mlx(rotary))
        self.shift = before.shift
        if not self.shift:
            self.rotary = self.stored_rotary = None

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

    def _to_log(self, positions: mx.array | None) -> list[Any]:
        """What the journal keeps of a token, of all slots."""
        there = [self.keys, self.values, positions, self.value_norms]
        if self.renumbering is not None:
            rotary = self.positions if self.rotary is None else self.rotary
            stored = rotary if self.stored_rotary is None else self.stored_rotary
            there += [rotary, stored if self.keeps_stored else None]
        return there

    def _log(self, logged: list[Any]) -> None:
        """Into the journal with n tokens of `_to_log`, the last of the last step."""
        n = logged[0].shape[2]
        first = self.offset - n
        self.journal = self.journal.with_evicted(
            *(Evicted(first + i, *(_token(e, i) for e in logged)) for i in range(n))
        )

    def _log_victim(self) -> None:
        if self.victim is None or not (self.journal.length or self.recall is not None):
            return
        limit = self.rule.max_size
        assert limit is not None
        if self.rule.by_age:
            # Known without those of all slots, which would have to be made.
            logged = take_slots(self._to_log(None), self.victim)
            oldest = self.newest - (limit - self.rule.n_sinks)
            logged[2] = to_mlx(np.full(self.victim.shape, oldest, np.int32))
        else:
            logged = take_slots(self._to_log(self.positions), self.victim)
        if self.journal.length:
            self._log(logged)
        if self.recall is not None:
            self._log_for_recall(Rows(*logged[:3]))
        read = [a for part in logged for a in arrays_of(part)]
        # Read before the slot is written: a read that waits turns the write in place
        # into a copy.
        self.keys, self.values = after(self.keys, read), after(self.values, read)

    def _log_for_recall(self, rows: Rows) -> None:
        """Give tokens, in order of step, to the recall."""
        assert self.recall is not None
        self.recall = self.recall.with_evicted(rows)

    def _log_scores(self) -> None:
        if self.scores is None or not self.journal.length or not self.offset:
            return
        if self.victim is None:
            scores = first_slots(self.scores, self.size())
            before = ScoresBefore(self.offset, scores)
        else:
            known = (self.scores, self.positions, self.victim)
            before = ScoresBefore(self.offset, *known)
        self.journal = self.journal.with_scores(before)

    def _bring_back(self, to: int) -> mx.array:
        """Add the journal's tokens; all columns [B, H', n], those before `to` first."""
        back = self.journal.evicted_since(to)
        # The victim was evicted at the last step, so it was there before `to`.
        n = self.size() if self.victim is None else self.keys.shape[2]
        for name in Evicted._fields[1:]:
            if (entries := getattr(self, name)) is not None:
                parts = [first_slots(entries, n), *(getattr(e, name) for e in back)]
                setattr(self, name, join(parts))
        positions: Any = self.positions
        return mx.argsort(mx.where(positions < to, positions, _LAST), axis=-1)

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
        return _in_order(self.positions, self.victim, self.size())

    def _held(self, entries: Any, order: mx.array | None) -> Any:
        if order is None or entries is None:
            return first_slots(entries, self.size())
        return gather(entries, order)


def _token(entries: Any, i: int) -> Any:
    return None if entries is None else each(lambda a: a[:, :, i : i + 1], entries)


def _in_order(positions: Any, victim: mx.array, n: int) -> mx.array:
    """The first n slots in order of position, the victim's left out."""
    return _by_age(positions, victim)[..., :n]


def _by_age(positions: Any, victim: mx.array) -> mx.array:
    """All slots in order of position, the victim's last."""
    slots = mx.arange(positions.shape[2])
    positions = mx.where(slots == victim, _LAST, positions)
    return mx.argsort(positions, axis=-1)


def _ordered_scores(before: ScoresBefore, n: int) -> mx.array:
    """Scores [B, H', n] in order of position."""
    if before.victim is None:
        return before.scores[..., :n]
    return gather(before.scores, _in_order(before.positions, before.victim, n))
