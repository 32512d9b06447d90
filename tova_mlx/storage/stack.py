"""The slots of many rows in one set of arrays, for steps of one token a row.

Every row has its own number of tokens: a row that is not full yet writes into its next
free slot, a full one into the slot of its victim. Free slots are hidden by `step_mask`.
Shapes as in `slots`: B rows, H' choosers, S slots.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .packed import Rows, around, arrays, each, join, nbytes, put
from .slots import Slots, allocation, held, numbered, row_norms

# Those with slots in axis 2, by the names that `Slots` has for them.
_ARRAYS = ("keys", "values", "positions", "scores", "norms")


class Stack:
    """The rows of several `Slots` of one rule, each of one row.

    Args:
        parts: what is stacked; not changed.
        keys, values: the next step's rows [B, n_kv_heads, 1, head_dim], for shapes.

    Attributes:
        offsets: tokens seen, per row.
        keys, values, positions, scores, norms: as in `Slots`, positions always there.
        victim: uint32 [B, H', 1]; read only for rows that have evicted.
    """

    def __init__(self, parts: Sequence[Slots], keys: mx.array, values: mx.array):
        rule = self.rule = parts[0].rule
        self.offsets = [p.offset for p in parts]
        self.victim: mx.array | None = None
        n_kv_heads, self._choosers = keys.shape[1], parts[0].choosers(keys)
        self.storage = parts[0].storage
        n = allocation(max(p.size() for p in parts) + 1, rule.max_size)
        packed = self.storage.pack(keys, values)
        self.keys: Any = None
        self.values: Any = None
        self.positions: Any = None
        self.scores: Any = None
        self.norms: Any = None
        empty = {
            "keys": each(lambda a: a[:1, :, :0], packed[0]),
            "values": each(lambda a: a[:1, :, :0], packed[1]),
            "positions": mx.zeros((1, self._choosers, 0), mx.int32),
            "scores": mx.zeros((1, self._choosers, 0)) if rule.memory else None,
            "norms": mx.zeros((1, n_kv_heads, 0)) if rule.value_weighted else None,
        }
        for name, nothing in empty.items():
            if nothing is None:
                continue
            rows = []
            for part in parts:
                row = getattr(part, name) if part.keys is not None else nothing
                if row is None:  # positions of a row that has not evicted
                    row = numbered(1, self._choosers, 0, part.taken)
                rows.append(_padded(Slots.first(row, part.taken), n))
            setattr(self, name, join(rows, axis=0))
        slots = []
        for part in parts:
            slot = part.victim
            if slot is None:
                slot = mx.full((1, self._choosers, 1), part.size(), mx.uint32)
            slots.append(slot)
        # Where the next token of each row goes.
        self._slot = mx.concatenate(slots)

    def twin(self) -> "Stack":
        """The same rows, to be changed while these stay, as `Slots.twin`."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def tied(self, output: mx.array) -> mx.array:
        """The output of an attention, as `Slots.tied`."""
        known = (self.positions, self.scores, self.norms, self.victim)
        return mx.depends([output], [a for a in known if a is not None])[0]

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
    def arrays(self) -> list[mx.array]:
        rows = [*(getattr(self, name) for name in _ARRAYS), self._slot, self.victim]
        return [a for r in rows for a in arrays(r)]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    @property
    def max_nbytes(self) -> int | None:
        """Bytes that the arrays can reach; None if unlimited."""
        if self.rule.max_size is None:
            return None
        slots = self.keys.shape[2]
        per_slot = sum(nbytes(getattr(self, name)) for name in _ARRAYS) // slots
        return self.nbytes + per_slot * (self.rule.max_size + 1 - slots)

    def append(self, keys: mx.array, values: mx.array) -> tuple[Rows, Rows]:
        """Write a row's token each; return the slots [B, n_kv_heads, n, ·] to see."""
        n = max(held(o, self.rule.max_size) for o in self.offsets) + 1
        if n > self.keys.shape[2]:
            self._grow(allocation(n, self.rule.max_size))
        slot = self._next_slot()
        packed_keys, packed_values = self.storage.pack(keys, values)
        self.keys = put(self.keys, packed_keys, slot)
        self.values = put(self.values, packed_values, slot)
        position = mx.broadcast_to(self.newest + 1, slot.shape)
        self.positions = put(self.positions, position, slot)
        if self.scores is not None:
            self.scores = put(self.scores, mx.zeros(slot.shape), slot)
        if self.norms is not None:
            self.norms = put(self.norms, row_norms(values), slot)
        self.offsets = [o + 1 for o in self.offsets]
        limit = self.rule.max_size
        free = mx.array([held(o, limit) for o in self.offsets], mx.uint32)
        self._slot = mx.broadcast_to(free[:, None, None], slot.shape)
        self.victim = None
        return Slots.first(self.keys, n), Slots.first(self.values, n)

    def remember(self, scores: mx.array) -> None:
        """Store the scores [B, H', n] of the first n slots, if the rule has memory."""
        if self.rule.memory:
            self.scores = _padded(scores, self.keys.shape[2])

    def part(self, row: int, journal: int) -> Slots:
        """One row by itself, in arrays of its own, with an empty journal."""
        part = Slots(self.rule, journal, self.storage)
        part.offset = self.offsets[row]
        here = slice(row, row + 1)
        if part.evicted:
            part.victim = mx.contiguous(self._next_slot()[here])
        if part.offset:
            for name in _ARRAYS:
                if (rows := getattr(self, name)) is not None:
                    n = part.taken
                    own = each(lambda a, n=n: mx.contiguous(a[here, :, :n]), rows)
                    setattr(part, name, own)
        # Now: what waits would keep all rows alive, and turn their next write in
        # place into a copy.
        mx.eval([a for rows in part.arrays for a in arrays(rows)])
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
        for name in _ARRAYS:
            if (array := getattr(self, name)) is not None:
                setattr(self, name, _padded(array, n))


def step_mask(offsets: Sequence[int], limit: int | None) -> mx.array | None:
    """The slots that rows see in their next step, bool [B, 1, 1, n]; None: all."""
    taken = [held(o, limit) + 1 for o in offsets]
    n = max(taken)
    if min(taken) == n:
        return None
    return mx.arange(n) < mx.array(taken)[:, None, None, None]


def _padded(rows: Any, n: int) -> Any:
    """With zeros up to n slots."""
    spare = n - rows.shape[2]
    return around(rows, 0, spare) if spare else rows
