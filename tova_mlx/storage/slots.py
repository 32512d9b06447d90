"""One layer's storage: keys and values in slots, and what is known of each.

A full layer has `max_size + 1` slots. The newest token is written into the slot of the
last victim, so an eviction moves nothing and costs one row. Knows where tokens are;
who leaves is decided elsewhere. Shapes: rows [B, n_kv_heads, slots, head_dim]; H' is 1
(granularity "layer") or n_kv_heads ("head").
"""

from typing import Any

import mlx.core as mx

from ..policies import Rule
from .journal import Gone, Journal, Scores
from .packed import Rows, Storage, arrays, each, gather, join, nbytes, put

_LAST = 2**31 - 1
_STEP = 256
_PLAIN = Storage()


def numbered(batch: int, choosers: int, start: int, n: int) -> mx.array:
    """The positions from `start` on, int32 [B, H', n]."""
    count = mx.arange(start, start + n, dtype=mx.int32)
    return mx.broadcast_to(count, (batch, choosers, n))


def held(offset: int, limit: int | None) -> int:
    """Tokens held after `offset` seen."""
    return offset if limit is None else min(offset, limit)


def allocation(n: int, limit: int | None) -> int:
    """Slots to allocate for n tokens."""
    slots = -(-n // _STEP) * _STEP
    return slots if limit is None else min(slots, limit + 1)


def row_norms(values: mx.array) -> mx.array:
    """L2 norms of values [..., head_dim], float32."""
    return mx.linalg.norm(values.astype(mx.float32), axis=-1)


class Slots:
    """The arrays of one layer under a rule.

    Attributes:
        offset: tokens seen.
        keys, values: rows, or None while empty.
        positions: int32 [B, H', slots]; None while slot i holds position i.
        scores: float32 [B, H', slots], for rules with memory.
        norms: float32 [B, n_kv_heads, slots] of the values, for value-weighted rules.
        victim: uint32 [B, H', 1], the slot to write next; None: slot `size()`.
        journal: what the last steps destroyed.
    """

    def __init__(self, rule: Rule, journal: int = 0, storage: Storage = _PLAIN):
        self.rule, self.storage = rule, storage
        self.clear(journal)

    def clear(self, journal: int) -> None:
        """Be as new: nothing seen, nothing held."""
        self.journal = Journal(journal)
        self.offset = 0
        self.keys: Rows | None = None
        self.values: Rows | None = None
        self.positions: mx.array | None = None
        self.scores: mx.array | None = None
        self.norms: mx.array | None = None
        self.victim: mx.array | None = None

    def twin(self) -> "Slots":
        """The same slots, to be changed while these stay as they are.

        The arrays are shared until one of the two writes; MLX still writes in place if
        the other is gone by the time that the write is evaluated.
        """
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def size(self) -> int:
        """Tokens held."""
        return held(self.offset, self.rule.max_size)

    @property
    def evicted(self) -> bool:
        """Whether a token has left."""
        return self.offset > self.size()

    @property
    def newest(self) -> int:
        """The position of the newest token."""
        return self.offset - 1

    @property
    def taken(self) -> int:
        """Slots in use, the dead one included."""
        return self.size() + (self.victim is not None)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Keys, values (`Rows`), positions, scores, norms, victim; or None."""
        return (
            self.keys,
            self.values,
            self.positions,
            self.scores,
            self.norms,
            self.victim,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(map(nbytes, [*self.arrays, *self.journal.arrays]))

    def choosers(self, keys: Any) -> int:
        """H': how many victims a row of the batch has per step."""
        return keys.shape[1] if self.rule.per_head else 1

    @property
    def max_nbytes(self) -> int | None:
        """Bytes that the arrays can reach; None if unlimited or still empty."""
        limit = self.rule.max_size
        if limit is None or self.keys is None or self.values is None:
            return None
        batch, n_kv_heads, slots, _ = self.keys.shape
        row_bytes = (nbytes(self.keys) + nbytes(self.values)) // slots
        choosers = batch * self.choosers(self.keys)
        per_slot = row_bytes + 4 * batch * n_kv_heads * self.rule.value_weighted
        memory = bool(self.rule.memory)
        per_step = per_slot + 4 * choosers
        if memory:
            per_step += 8 * choosers * (limit + 1) + 4 * choosers
        per_slot += 4 * choosers * (1 + memory)
        slots = per_slot * (limit + 1) + 4 * choosers
        return slots + per_step * self.journal.length

    def append(self, keys: mx.array, values: mx.array) -> tuple[Rows, Rows]:
        """Write one row, or rows that evict nothing; return all rows held."""
        start, length = self.size(), keys.shape[2]
        n = start + length
        packed_keys, packed_values = self.storage.pack(keys, values)
        if self.victim is None:
            self._reserve(n, packed_keys, packed_values)
        self._note_scores()
        self._note_dead_slot()
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._write(self.keys, packed_keys, start)
        self.values = self._write(self.values, packed_values, start)
        if self.norms is not None:
            self.norms = self._write(self.norms, row_norms(values), start)
        if self.positions is not None:
            position = self._numbered(keys, self.offset, length)
            self.positions = self._write(self.positions, position, start)
        if self.scores is not None and self.victim is not None:
            zero = mx.zeros((*self.scores.shape[:2], length))
            self.scores = self._write(self.scores, zero, start)
        self.offset += length
        if self.positions is None and n > self.size():
            self.positions = self._numbered(self.keys, 0, n)
        return self.first(self.keys, n), self.first(self.values, n)

    def extend(self, keys: Any, values: Any) -> tuple[Rows, Rows]:
        """Put a block's rows after those held, in order of position, for `keep`.

        Until then there are more slots than the limit and `scores` has none for the
        new rows.
        """
        self._note_dead_slot()
        length = keys.shape[2]
        positions = self._numbered(keys, self.offset, length)
        norms = None
        if self.rule.value_weighted:
            norms = row_norms(values)
        keys, values = self.storage.pack(keys, values)
        if self.keys is not None and self.values is not None and self.offset:
            order = self._order()
            positions = mx.concatenate([self.held_positions(), positions], axis=2)
            keys = join([self._held(self.keys, order), keys])
            values = join([self._held(self.values, order), values])
            if self.scores is not None:
                self.scores = self._held(self.scores, order)
            if norms is not None and self.norms is not None:
                norms = mx.concatenate([self._held(self.norms, order), norms], axis=2)
        else:
            self.scores = None
        self.keys, self.values = keys, values
        self.positions, self.norms, self.victim = positions, norms, None
        self.offset += length
        return keys, values

    def keep(self, columns: mx.array) -> None:
        """Move the surviving columns [B, H', size()] into the first slots."""
        spare = allocation(self.size() + 1, self.rule.max_size) - self.size()
        # The free slots' contents are never read; any column will do.
        padded = mx.pad(columns, [(0, 0), (0, 0), (0, spare)])
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        # With the journal's rows, or they would keep all columns alive until read.
        noted = self.journal.arrays
        self.keys = _after(gather(self.keys, padded), noted)
        self.values = _after(gather(self.values, padded), noted)
        if self.norms is not None:
            self.norms = gather(self.norms, padded)
        self.positions = gather(self.positions, padded) if self.evicted else None

    def note_gone(self, columns: mx.array) -> None:
        """Into the journal with the columns [B, H', n] that leave, in order of step.

        Before `keep`; the last of them leaves at the newest token's step.
        """
        n = min(self.journal.length, columns.shape[2])
        if n:
            self._note(columns[..., -n:])

    def tied(self, output: mx.array) -> mx.array:
        """The output of an attention, with what is known of the slots evaluated too.

        Nothing else may read it for thousands of steps, and each would keep its graph,
        and with it the step's arrays, alive.
        """
        known = (self.positions, self.scores, self.norms, self.victim)
        read = [a for a in known if a is not None]
        return mx.depends([output], read)[0] if read else output

    def can_take_back(self, n: int) -> bool:
        """Whether the newest n tokens can be taken back exactly."""
        to, limit = self.offset - n, self.rule.max_size
        if n <= 0 or to <= 0:
            return True
        if self.rule.memory and self.journal.scores_before(to) is None:
            return False
        evictions = 0 if limit is None else self.offset - max(to, limit)
        at_hand = len(self.journal.gone_since(to)) + (self.victim is not None)
        return evictions <= at_hand

    def take_back(self, n: int) -> None:
        """Be as if the newest n tokens had not come; n <= 0 takes nothing back."""
        if n <= 0:
            return
        to = self.offset - n
        if to <= 0:
            self.clear(self.journal.length)
            return
        order = self._bring_back(to) if self.evicted else None
        self.offset, self.victim = to, None
        if order is not None:
            self.keep(order[..., : self.size()])
        if (before := self.journal.scores_before(to)) is not None:
            self.remember(_ordered_scores(before, self.size()))
        self.journal = self.journal.until(to)

    def remember(self, scores: mx.array) -> None:
        """Store the scores [B, H', n] of the first n slots, if the rule has memory."""
        if self.rule.memory:
            assert self.keys is not None
            spare = self.keys.shape[2] - scores.shape[2]
            if spare:
                scores = mx.pad(scores, [(0, 0), (0, 0), (0, spare)])
            self.scores = scores

    @staticmethod
    def first(array: Any, n: int) -> Any:
        """The first n slots of an array of the cache; None for one it lacks."""
        # A slice of everything is still work for the device.
        if array is None or array.shape[2] == n:
            return array
        return each(lambda a: a[:, :, :n], array)

    def held_positions(self) -> mx.array:
        """int32 [B, H', size()], ascending."""
        if self.keys is None:
            return mx.zeros((1, 1, 0), mx.int32)
        if self.positions is None:
            return self._numbered(self.keys, 0, self.size())
        return self._held(self.positions, self._order())

    def held_rows(self) -> tuple[Rows, Rows]:
        """Keys and values held, in the order of `held_positions`."""
        assert self.keys is not None
        assert self.values is not None
        order = self._order()
        return self._held(self.keys, order), self._held(self.values, order)

    def _note(self, columns: Any) -> None:
        """Into the journal with columns [B, H', n]; the last left at the last step."""
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        n = columns.shape[2]
        keys, values = gather(self.keys, columns), gather(self.values, columns)
        positions = gather(self.positions, columns)
        norms = None if self.norms is None else gather(self.norms, columns)
        gone = []
        for i in range(n):
            row = (slice(None), slice(None), slice(i, i + 1))
            gone.append(
                Gone(
                    self.offset - n + i,
                    each(lambda a, row=row: a[row], keys),
                    each(lambda a, row=row: a[row], values),
                    positions[row],
                    None if norms is None else norms[row],
                )
            )
        self.journal = self.journal.with_gone(*gone)

    def _note_dead_slot(self) -> None:
        if self.victim is None or not self.journal.length:
            return
        self._note(self.victim)
        # Read before the slot is written: a read that waits turns the write in place
        # into a copy.
        read = [a for rows in self.journal.gone[-1][1:] for a in arrays(rows)]
        self.keys, self.values = _after(self.keys, read), _after(self.values, read)

    def _note_scores(self) -> None:
        if self.scores is None or not self.journal.length or not self.offset:
            return
        if self.victim is None:
            before = Scores(self.offset, self.first(self.scores, self.size()))
        else:
            before = Scores(self.offset, self.scores, self.positions, self.victim)
        self.journal = self.journal.with_scores(before)

    def _bring_back(self, to: int) -> mx.array:
        """Add the journal's rows; all columns [B, H', n], those before `to` first."""
        assert self.keys is not None
        back = self.journal.gone_since(to)
        # The dead slot's token left at the last step, so it was there before `to`.
        n = self.size() if self.victim is None else self.keys.shape[2]

        def joined(name: str) -> Any:
            rows = [getattr(g, name) for g in back]
            return join([self.first(getattr(self, name), n), *rows])

        self.keys, self.values = joined("keys"), joined("values")
        positions = self.positions = joined("positions")
        if self.norms is not None:
            self.norms = joined("norms")
        return mx.argsort(mx.where(positions < to, positions, _LAST), axis=-1)

    def _numbered(self, keys: Any, start: int, n: int) -> mx.array:
        return numbered(keys.shape[0], self.choosers(keys), start, n)

    def _reserve(self, n: int, keys: Rows, values: Rows) -> None:
        there = 0 if self.keys is None else self.keys.shape[2]
        if n <= there:
            return
        spare = allocation(n, self.rule.max_size) - there

        def grow(array: mx.array | None, *shape: int, dtype: Any) -> mx.array:
            new = mx.zeros(shape, dtype)
            return new if array is None else mx.concatenate([array, new], axis=2)

        rows = (*keys.shape[:2], spare)
        choosers = (keys.shape[0], self.choosers(keys), spare)
        for name, new in (("keys", keys), ("values", values)):
            free = each(
                lambda a: mx.zeros((*a.shape[:2], spare, a.shape[3]), a.dtype), new
            )
            held_rows = getattr(self, name)
            grown = free if held_rows is None else join([held_rows, free])
            setattr(self, name, grown)
        if self.positions is not None:
            self.positions = grow(self.positions, *choosers, dtype=mx.int32)
        if self.rule.memory:
            self.scores = grow(self.scores, *choosers, dtype=mx.float32)
        if self.rule.value_weighted:
            self.norms = grow(self.norms, *rows, dtype=mx.float32)

    def _write(self, rows: Any, new: Any, start: int) -> Any:
        """Put rows into the victim's slot, or from slot `start` on, in place.

        MLX writes into the same buffer as long as this is the only reference to it.
        """
        if self.victim is None or self.victim.size == 1:
            slot = mx.array([start]) if self.victim is None else self.victim
            slot = slot.reshape(1)
            return each(lambda a, row: mx.slice_update(a, row, slot, (2,)), rows, new)
        return put(rows, new, self.victim)

    def _order(self) -> mx.array | None:
        """Slots held in order of position [B, H', size()]; None: the first ones."""
        if self.victim is None:
            return None
        return _in_order(self.positions, self.victim, self.size())

    def _held(self, rows: Any, order: mx.array | None) -> Any:
        if order is None:
            return self.first(rows, self.size())
        return gather(rows, order)


def _in_order(positions: Any, victim: mx.array, n: int) -> mx.array:
    """The first n slots in order of position, the victim's left out."""
    slots = mx.arange(positions.shape[2])
    positions = mx.where(slots == victim, _LAST, positions)
    return mx.argsort(positions, axis=-1)[..., :n]


def _ordered_scores(before: Scores, n: int) -> mx.array:
    """Scores [B, H', n] in order of position."""
    if before.victim is None:
        return before.scores[..., :n]
    return gather(before.scores, _in_order(before.positions, before.victim, n))


def _after(rows: Any, read: list[mx.array]) -> Any:
    """The same rows, evaluated after `read` was."""
    if not read:
        return rows
    return each(lambda a: mx.depends([a], read)[0], rows)
