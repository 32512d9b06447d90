"""The slots of many batch rows in one set of arrays, for steps of one token a row.

Every row has its own number of tokens: a row that is not full yet writes into its next
free slot, a full one into the slot of its victim. Free slots are hidden by `step_mask`.
Shapes as in `fields`.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .entries import Entries, arrays_of, each, first_slots, join, nbytes, pad, to_mlx
from .fields import (
    PER_SLOT,
    SlotFields,
    position_range,
    positions_by_age,
    slots_to_allocate,
    tokens_held,
)
from .slots import Slots


class Stack(SlotFields):
    """The batch rows of several `Slots` of one rule, each of one row.

    Args:
        parts: what is stacked; not changed.
        keys, values: the next step's [B, n_kv_heads, 1, head_dim], for shapes.

    Attributes:
        offsets: tokens seen, per row; shifts: how far rotary positions are behind.
        victim: as in `SlotFields`; read only for rows that have evicted. Positions are
            always there.
    """

    def __init__(self, parts: Sequence[Slots], keys: mx.array, values: mx.array):
        super().__init__(parts[0].rule, parts[0].storage, parts[0].renumbering)
        rule, heads = self.rule, parts[0].eviction_heads(keys)
        self.offsets = [p.offset for p in parts]
        self.shifts = [p.shift for p in parts]
        n = slots_to_allocate(max(p.size() for p in parts) + 1, rule.max_size)
        stored = self.storage.store(keys[:1], values[:1])
        empty = {
            "keys": each(lambda a: a[:, :, :0], stored[0]),
            "values": each(lambda a: a[:, :, :0], stored[1]),
            "positions": mx.zeros((1, heads, 0), mx.int32),
            "scores": mx.zeros((1, heads, 0)) if rule.memory else None,
            "value_norms": None,
        }
        if rule.value_weighted:
            empty["value_norms"] = mx.zeros((1, keys.shape[1], 0))
        for name in ("rotary", "stored_rotary"):
            there = any(getattr(p, name) is not None for p in parts)
            empty[name] = empty["positions"] if there else None
        for name, nothing in empty.items():
            if nothing is None:
                continue
            rows = []
            for part in parts:
                row = getattr(part, name) if part.keys is not None else nothing
                if row is None:  # of a row that was not renumbered, or has not evicted
                    row = part.positions
                if row is None:
                    row = position_range(1, heads, 0, part.taken)
                rows.append(pad(first_slots(row, part.taken), 0, n - part.taken))
            setattr(self, name, join(rows, axis=0))
        slots = []
        for part in parts:
            slot = part.victim
            if slot is None:
                slot = mx.full((1, heads, 1), part.size(), mx.uint32)
            slots.append(slot)
        # Where the next token of each row goes; where its last one went, for rules that
        # evict by age.
        self._slot = mx.concatenate(slots)
        self._written = [p.size() - 1 if p.victim is None else p.written for p in parts]

    @property
    def evicted(self) -> bool:
        """Whether a row has evicted."""
        limit = self.rule.max_size
        return limit is not None and max(self.offsets) > limit

    @property
    def newest(self) -> mx.array:
        """The position of each row's newest token, int32 [B, 1, 1]."""
        return mx.array(self.offsets, mx.int32)[:, None, None] - 1

    @property
    def newest_of_rows(self) -> list[int]:
        """The position of each row's newest token."""
        return [o - 1 for o in self.offsets]

    @property
    def held(self) -> mx.array | None:
        """Which of the slots attended to hold a token, bool [B, 1, S]; None: all."""
        limit = self.rule.max_size
        # With the slot of the token that a full row is about to evict.
        taken = [min(o, o if limit is None else limit + 1) for o in self.offsets]
        return _taken_slots(taken)

    @property
    def arrays(self) -> tuple[Any, ...]:
        return (*super().arrays, self._slot)

    @property
    def max_nbytes(self) -> int | None:
        """Bytes that the arrays can reach; None if unlimited."""
        if self.rule.max_size is None:
            return None
        slots = self.keys.shape[2]
        per_slot = sum(nbytes(getattr(self, name)) for name in PER_SLOT) // slots
        return self.nbytes + per_slot * (self.rule.max_size + 1 - slots)

    def append(
        self, keys: mx.array, values: mx.array, *, settle: bool = True
    ) -> tuple[Entries, Entries]:
        """Write one token a row; return the entries [B, n_kv_heads, n, ·] to see.

        settle: whether what is known of it is written too, or left to the caller.
        """
        limit = self.rule.max_size
        n = max(tokens_held(o, limit) for o in self.offsets) + 1
        if n > self.keys.shape[2]:
            self._grow(slots_to_allocate(n, limit))
        slot = self._next_slot()
        new = mx.broadcast_to(self.newest + 1, slot.shape)
        shift = mx.array(self.shifts, mx.int32)[:, None, None]
        self.write_tokens(slot, keys, values, new, shift)
        if settle:
            self.settle()
        if self.rule.by_age:
            self.count_positions()
        self.offsets = [o + 1 for o in self.offsets]
        self._written = [self.slot_after(s) for s in self._written]
        following = [tokens_held(o, limit) for o in self.offsets]
        if self.rule.by_age:
            following = [self.slot_after(s) for s in self._written]
        free = np.array(following, np.uint32)[:, None, None]
        self._slot = to_mlx(np.broadcast_to(free, slot.shape))
        self.victim = None
        return first_slots(self.keys_to_read, n), first_slots(self.values, n)

    @property
    def renumbers(self) -> bool:
        """Whether the tokens of a row are to be renumbered now."""
        when, limit = self.renumbering, self.rule.max_size
        if when is None or limit is None:
            return False
        return any(o > limit and when.is_due(o) for o in self.offsets)

    def _positions_by_age(self) -> mx.array:
        rows = [
            positions_by_age(self.rule, self.keys.shape[2], offset - 1, written)
            for offset, written in zip(self.offsets, self._written, strict=True)
        ]
        return to_mlx(np.stack(rows)[:, None])

    def mark(self, victim: mx.array, scores: mx.array | None = None) -> None:
        """Mark the slots [B, H', 1] of the tokens that full rows evict now.

        scores: not read, for nobody observes a batch.
        """
        self.victim = victim

    def remember(self, scores: mx.array) -> None:
        """Store the scores [B, H', n] of the first n slots, if the rule has memory."""
        if self.rule.memory:
            self.scores = pad(scores, 0, self.keys.shape[2] - scores.shape[2])

    def part(self, row: int, journal: int) -> Slots:
        """Return one row by itself, in arrays of its own, with an empty journal."""
        part = Slots(self.rule, journal, self.storage, self.renumbering)
        part.offset, part.shift = self.offsets[row], self.shifts[row]
        part.written = self._written[row]
        here = slice(row, row + 1)
        if part.evicted:
            part.victim = mx.contiguous(self._next_slot()[here])
        if part.offset:
            for name in PER_SLOT:
                if (entries := getattr(self, name)) is not None:
                    n = part.taken
                    own = each(lambda a, n=n: mx.contiguous(a[here, :, :n]), entries)
                    setattr(part, name, own)
        if self.rule.by_age:
            part.positions = None
            if part.evicted:
                part.count_positions()
        if not part.shift:
            part.rotary = part.stored_rotary = None
        # Now: what waits would keep all rows alive, and turn their next write in
        # place into a copy.
        mx.eval([a for entries in part.arrays for a in arrays_of(entries)])
        return part

    def _next_slot(self) -> mx.array:
        limit = self.rule.max_size
        if self.victim is None or limit is None:
            return self._slot
        if min(self.offsets) > limit:
            return self.victim
        full = mx.array([o > limit for o in self.offsets])[:, None, None]
        return mx.where(full, self.victim, self._slot)

    def _grow(self, n: int) -> None:
        for name in PER_SLOT:
            if (entries := getattr(self, name)) is not None:
                setattr(self, name, pad(entries, 0, n - entries.shape[2]))


def step_mask(offsets: Sequence[int], limit: int | None) -> mx.array | None:
    """Return the slots seen in the next step, bool [B, 1, 1, n]; None: all."""
    seen = _taken_slots([tokens_held(o, limit) + 1 for o in offsets])
    return None if seen is None else seen[:, :, None]


def _taken_slots(taken: list[int]) -> mx.array | None:
    """Which of the first slots each row has taken, bool [B, 1, n]; None: all."""
    n = max(taken)
    if min(taken) == n:
        return None
    return mx.arange(n) < mx.array(taken)[:, None, None]
