"""What is known of each slot, and how a token is written: of one layer or of a batch.

Shapes: B rows of the batch, S slots; entries [B, n_kv_heads, S, head_dim]; H' is 1
(granularity "layer") or n_kv_heads ("head").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..policies import Rule
from .entries import arrays_of, first_slots, is_plain, pad, write
from .formats import Storage
from .rotation import Renumbering, RotatedEntries

if TYPE_CHECKING:
    from typing import Self

# What is known of each slot: arrays with the slots in axis 2.
PER_SLOT = (
    "keys",
    "values",
    "positions",
    "scores",
    "value_norms",
    "rotary",
    "stored_rotary",
)

_STEP = 256


def position_range(batch: int, heads: int, start: int, n: int) -> mx.array:
    """Return the n positions from `start` on, int32 [B, H', n]."""
    count = mx.arange(start, start + n, dtype=mx.int32)
    return mx.broadcast_to(count, (batch, heads, n))


def tokens_held(offset: int, limit: int | None) -> int:
    """Return how many tokens are held after `offset` seen."""
    return offset if limit is None else min(offset, limit)


def slots_to_allocate(n: int, limit: int | None) -> int:
    """Return how many slots to allocate for n tokens."""
    slots = -(-n // _STEP) * _STEP
    return slots if limit is None else min(slots, limit + 1)


def positions_by_age(
    rule: Rule, n: int, newest: int, slot: int
) -> npt.NDArray[np.int32]:
    """Return the position in each of n slots when the newest token went into `slot`.

    rule: one that evicts by age, so that each token went into the slot after the one
    before it, and past the last slot came the first that is not protected.
    """
    slots = np.arange(n, dtype=np.int32)
    if rule.max_size is None:
        return slots
    ages = (slot - slots) % (rule.max_size + 1 - rule.n_sinks)
    return np.where(slots < rule.n_sinks, slots, newest - ages).astype(np.int32)


def norms_of(values: mx.array) -> mx.array:
    """Return the L2 norms of values [..., head_dim], float32."""
    return mx.linalg.norm(values.astype(mx.float32), axis=-1)


class Fresh(NamedTuple):
    """New tokens whose entries are written, and nothing else of them yet.

    slot: where, as `entries.write` takes it; positions: int32 [B, H', n]; values:
    [B, n_kv_heads, n, head_dim], as they came.
    """

    slot: mx.array | int
    positions: mx.array
    values: mx.array


class SlotFields:
    """The arrays of a layer under a rule.

    Attributes:
        keys, values: entries, or None while empty.
        scores: float32 [B, H', S], for rules with memory.
        value_norms: float32 [B, n_kv_heads, S], L2, for value-weighted rules.
        rotary: int32 [B, H', S], the rotary position of each token, or None where that
            is the token's index.
        stored_rotary: int32 [B, H', S], the one that the stored key is rotated for, or
            None where that is the same.
        victim: uint32 [B, H', 1], the slot to write next, or None.
        fresh: what `settle` has to write, or None.
    """

    def __init__(
        self, rule: Rule, storage: Storage, renumbering: Renumbering | None = None
    ):
        self.rule, self.storage, self.renumbering = rule, storage, renumbering
        self.keys: Any = None
        self.values: Any = None
        self._known_positions: mx.array | None = None
        # Whether they are of before the newest token, see `positions`.
        self._behind = False
        self.scores: mx.array | None = None
        self.value_norms: mx.array | None = None
        self.rotary: mx.array | None = None
        self.stored_rotary: mx.array | None = None
        self.victim: mx.array | None = None
        self.fresh: Fresh | None = None

    @property
    def positions(self) -> mx.array | None:
        """Int32 [B, H', S], or None where slot i holds position i.

        Those of a rule that evicts by age are known from how many tokens came, and
        written down when somebody asks.
        """
        if self._behind:
            self._known_positions, self._behind = self._positions_by_age(), False
        known, fresh = self._known_positions, self.fresh
        if known is None or fresh is None or self.rule.by_age:
            return known
        return write(known, fresh.positions, fresh.slot)

    @positions.setter
    def positions(self, positions: mx.array | None) -> None:
        self._known_positions, self._behind = positions, False

    def count_positions(self) -> None:
        """Have the positions of a rule that evicts by age made when they are read."""
        self._known_positions, self._behind = None, True

    def _positions_by_age(self) -> mx.array:
        """The positions of a rule that evicts by age, once it has evicted."""
        raise NotImplementedError

    def slot_after(self, slot: int) -> int:
        """Return where the next token goes if a rule evicts by age; slot: the last."""
        return self.rule.n_sinks if slot == self.rule.max_size else slot + 1

    def twin(self) -> Self:
        """Return the same slots, to be changed while these stay as they are.

        The arrays are shared until one of the two writes; MLX still writes in place if
        the other is gone by the time that the write is evaluated.
        """
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Those `PER_SLOT`, then the victim; None for one that is lacking."""
        return (*(getattr(self, name) for name in PER_SLOT), self.victim)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for entries in self.arrays for a in arrays_of(entries))

    def positions_of(self, n: int, *, settled: bool = True) -> mx.array:
        """Return the positions of the tokens in the first n slots, int32 [B, H', n].

        settled: whether that of the newest token must be among them.
        """
        known = self.positions if settled else self._known_positions
        if known is not None:
            return first_slots(known, n)
        heads = self.eviction_heads(self.keys)
        return position_range(self.keys.shape[0], heads, 0, n)

    @property
    def keys_to_read(self) -> Any:
        """The keys, rotated for the rotary positions of their tokens."""
        if self.stored_rotary is None or self.rotary is None:
            return self.keys
        assert self.renumbering is not None
        assert self.renumbering.rotation is not None
        return RotatedEntries(
            self.keys,
            self.stored_rotary[..., None],
            self.rotary[..., None],
            self.renumbering.rotation,
        )

    @property
    def keeps_stored(self) -> bool:
        """Whether keys stay rotated as they were stored: quantised ones do."""
        when = self.renumbering
        return when is not None and bool(when.rotation) and not is_plain(self.keys)

    def rotate(self, rotary: mx.array) -> None:
        """Give the tokens in the slots these rotary positions, int32 [B, H', S]."""
        assert self.renumbering is not None
        before: Any = self.positions if self.rotary is None else self.rotary
        self.rotary = rotary
        if self.keeps_stored:
            if self.stored_rotary is None:
                self.stored_rotary = before
            return
        keys = self.renumbering.rotated(self.keys.astype(mx.float32), before, rotary)
        # One that stays where it is keeps its last bit too.
        stays = (before == rotary)[..., None]
        self.keys = mx.where(stays, self.keys, keys.astype(self.keys.dtype))

    def eviction_heads(self, keys: Any) -> int:
        """H': how many victims a row of the batch has per step."""
        return keys.shape[1] if self.rule.per_head else 1

    @property
    def tied_to(self) -> list[mx.array]:
        """What else is evaluated with an output."""
        return []

    def tied(self, output: mx.array) -> mx.array:
        """Return the output of an attention, evaluated with what is known of the slots.

        Nothing else may read it for thousands of steps, and each would keep its graph,
        and with it the step's arrays, alive.
        """
        known = [getattr(self, name) for name in PER_SLOT[3:]]
        if not self.rule.by_age:
            known += [self.positions, self.victim]
        read = [a for a in known if a is not None] + self.tied_to
        return mx.depends([output], read)[0] if read else output

    def write_tokens(
        self,
        slot: mx.array | int,
        keys: mx.array,
        values: mx.array,
        positions: mx.array,
        shift: int | mx.array,
    ) -> None:
        """Write new tokens into the slots that `entries.write` takes, but for `fresh`.

        keys, values: [B, n_kv_heads, n, head_dim]; positions: int32 [B, H', n]; shift:
        how far rotary positions are behind.
        """
        new_keys, new_values = self.storage.store(keys, values)
        self.keys = write(self.keys, new_keys, slot)
        self.values = write(self.values, new_values, slot)
        for name in ("rotary", "stored_rotary"):
            if (array := getattr(self, name)) is not None:
                setattr(self, name, write(array, positions - shift, slot))
        self.fresh = Fresh(slot, positions, values)

    def settle_as(self, positions: mx.array, value_norms: mx.array | None) -> None:
        """Take what was written of the first n slots, the newest tokens included."""
        self.fresh = None
        if self.positions is not None:
            self.positions = pad(positions, 0, self.keys.shape[2] - positions.shape[2])
        if value_norms is not None:
            n = self.keys.shape[2] - value_norms.shape[2]
            self.value_norms = pad(value_norms, 0, n)

    def settle(self) -> None:
        """Write what is known of the newest tokens, unless that was done."""
        if self.fresh is None:
            return
        slot, positions, values = self.fresh
        self.fresh = None
        if self.rule.by_age:
            return
        if self.positions is not None:
            self.positions = write(self.positions, positions, slot)
        if self.value_norms is not None:
            self.value_norms = write(self.value_norms, norms_of(values), slot)
        if self.scores is not None:
            self.scores = write(self.scores, mx.zeros(positions.shape), slot)
