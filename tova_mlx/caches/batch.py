"""Rows of unequal length in one cache: mlx-lm's batch protocol.

Each row is what it would be alone. While prompts are read, every row is a cache of its
own: who leaves is settled row by row anyway. While one token a row is decoded, all rows
lie in one `Stack` and a step is one operation. Padding is cut off before it comes to a
row, so it can neither attend, be attended to, take a slot nor leave one.
"""

import copy
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..attention.evicting import attend_and_evict, evict_unseen
from ..attention.sharing import Given
from ..attention.softmax import attend_newest
from ..errors import CacheStateError
from ..hooks.layers import total
from ..policies import Rule
from ..storage.packed import Rows, Storage, around, each, join, to_mlx
from ..storage.slots import held
from ..storage.stack import Stack, step_mask
from .layer import PolicyKVCache
from .refusals import attended_again, check_values, unattended

# The part of a chunk that is a row's own: from, to.
Span = tuple[int, int]


class _Part(NamedTuple):
    """What a row's update gave, and where that lies in the batch's arrays."""

    queries: slice
    columns: slice
    keys: Rows
    values: Rows


class _Made(NamedTuple):
    """How the rows of a batch were made: what they have in common."""

    kind: type[PolicyKVCache]
    rule: Rule
    storage: Storage
    prefill: str
    journal: int
    shares: bool

    @classmethod
    def of(cls, cache: PolicyKVCache) -> "_Made":
        slots = cache.slots
        how = (cache.prefill, slots.journal.length, cache.shares)
        return cls(type(cache), cache.rule, slots.storage, *how)

    def check(self, other: "_Made") -> None:
        """Raises CacheStateError for rows that were made otherwise."""
        for name, mine, theirs in zip(self._fields, self, other, strict=True):
            if mine != theirs:
                raise CacheStateError(
                    f"{self.rule.policy}: caches of different options ({name}: {mine} "
                    f"and {theirs}) cannot be one batch. Convert the model once, then "
                    "make all of them."
                )


class BatchPolicyKVCache:
    """Caches of one row each, as one cache of a layer.

    Made by `merge`, as mlx-lm's `BatchGenerator` does. `offset` is an array here: the
    position of the next token, int32 [B].
    """

    def __init__(self, rows: Sequence[PolicyKVCache]):
        self._rows = list(rows)
        self._stack: Stack | None = None
        self.rule = rows[0].rule
        self._made = _Made.of(rows[0])
        # Padding on the left, and own tokens after it (None: all that come), per row;
        # how much of both has come.
        self._left = [0] * len(self._rows)
        self._lengths: list[int] | None = None
        self._done = 0
        # The module whose attention is still to come for the last update.
        self._awaits: str | None = None
        # Tokens seen before it, by the row that had seen most.
        self._before = 0
        # What the last update gave, row by row and joined, until it is attended to.
        self._parts: list[_Part] = []
        self._joined: list[Rows] = []
        self._given = Given(rows[0].shares)

    @classmethod
    def merge(cls, caches: Sequence[PolicyKVCache]) -> "BatchPolicyKVCache":
        """A batch of copies of these caches.

        Raises CacheStateError: caches of different rules, or of several rows.
        """
        first = caches[0]
        made = _Made.of(first)
        for cache in caches:
            made.check(_Made.of(cache))
            if cache.keys is not None and cache.keys.shape[0] != 1:
                raise CacheStateError(
                    f"{first.rule.policy}: a cache of {cache.keys.shape[0]} rows "
                    "cannot be a row of a batch. Use caches of one row."
                )
        return cls([copy.deepcopy(c) for c in caches])

    # What mlx-lm does with a batch

    def extract(self, idx: int) -> PolicyKVCache:
        """One row as a cache of its own; the batch keeps it too."""
        if self._stack is None:
            return copy.deepcopy(self._rows[idx])
        return self._row(idx)

    def filter(self, batch_indices: Iterable[int]) -> None:
        """Keep just these rows, in this order."""
        indices = np.array(batch_indices).reshape(-1).tolist()
        rows = self._unstacked()
        self._rows = [rows[i] for i in indices]
        self._left = [self._left[i] for i in indices]
        if self._lengths is not None:
            self._lengths = [self._lengths[i] for i in indices]

    def extend(self, other: "BatchPolicyKVCache") -> None:
        """Take in the rows of another batch, behind one's own."""
        if self._pending or other._pending:
            raise CacheStateError(
                f"{self.rule.policy}: rows cannot join while padded prompts are read. "
                "Call finalize first."
            )
        self._made.check(other._made)
        self._rows = [*self._unstacked(), *other._unstacked()]
        self._left = [0] * len(self._rows)

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padded chunks, up to `finalize`.

        left_padding: padding before each row's tokens; lengths: tokens of each row;
        right_padding: known from the lengths, and refused without them.
        """
        if right_padding is not None and max(right_padding) > 0 and lengths is None:
            raise CacheStateError(
                f"{self.rule.policy}: right_padding without lengths does not say "
                "where a row ends. Give lengths too."
            )
        if left_padding is not None:
            self._left = [int(n) for n in left_padding]
        if lengths is not None:
            self._lengths = [int(n) for n in lengths]
        self._done = 0

    def finalize(self) -> None:
        """The end of what `prepare` announced."""
        self._left = [0] * len(self._left)
        self._lengths, self._done = None, 0

    # The model's side

    @property
    def offset(self) -> mx.array:
        """The position of each row's next token, int32 [B]; below 0 in padding."""
        ahead = [max(0, left - self._done) for left in self._left]
        return mx.array([o - a for o, a in zip(self._offsets, ahead, strict=True)])

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Who sees whom, bool [B, 1, N, columns]; None: everyone all."""
        if self._steps(N) and window_size is None:
            return step_mask(self._offsets, self.rule.max_size)
        rows, spans = self._unstacked(), self._cut(N)
        before = max(row.size() for row in rows)
        # Padding looks at everything, or its output would not be a number.
        mask = np.ones((len(rows), 1, N, before + N), np.bool_)
        for i, (row, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
            own = row.make_mask(stop - start, window_size, True) if stop > start else 0
            first = before + start - row.size()
            mask[i, 0, start:stop] = False
            mask[i, 0, start:stop, first : before + stop] = (
                np.array(own) if isinstance(own, mx.array) else True
            )
        return to_mlx(mask)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Rows, Rows]:
        """Store new rows [B, n_kv_heads, L, head_dim]; return all to attend to."""
        length = keys.shape[2]
        if self._awaits is not None and not self.rule.by_age:
            raise unattended(self._awaits, self.rule, self._before, length)
        # Before anything is written: a second reference turns a write into a copy.
        self._given.forget()
        self._parts, self._joined = [], []
        module = sys._getframe(1).f_globals.get("__name__", "the model")
        self._awaits, self._before = module, max(self._offsets, default=0)
        if not self._steps(length):
            return self._given.note(self._update_rows(keys, values, module))
        if self._stack is None:
            parts = [row.slots for row in self._rows]
            self._stack, self._rows = Stack(parts, keys, values), []
        # Changed apart and put in place at the end: what fails leaves no trace.
        stack = self._stack.twin()
        given = stack.append(keys, values)
        if stack.evicted and self.rule.by_age:
            evict_unseen(stack)
        self._stack = stack
        return self._given.note(given)

    def attend(
        self,
        queries: mx.array,
        keys: Any,
        values: Any,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention of queries [B, n_heads, L, head_dim], as in PolicyKVCache."""
        how: dict[str, Any] = {"scale": scale, "mask": mask, "sinks": sinks}
        module = self._awaits
        if module is None:
            if self._given.rows is None:
                raise attended_again(self.rule)
            return self._given.attend(queries, keys, values, **how)
        if self._stack is None:
            attend = partial(self._attend_rows, self._parts, self._joined)
            self._given.note_again(attend)
            output = attend(queries, keys, values, **how)
            self._parts, self._joined = [], []
        elif self.rule.by_age:
            output = attend_newest(queries, keys, values, **how)[0]
            output = self._stack.tied(output)
        else:
            check_values(module, self.rule, self._stack.values, values)
            stack = self._stack.twin()
            output = attend_and_evict(stack, queries, keys, values, **how)
            self._stack = stack
        self._awaits = None
        return output

    def keys_and_values(self) -> tuple[Rows, Rows]:
        """What the last update gave, for a layer that shares it."""
        if self._given.rows is None:
            raise attended_again(self.rule)
        return self._given.rows

    # What is held

    def size(self) -> int:
        """Tokens held by the row that holds most."""
        return held(max(self._offsets, default=0), self.rule.max_size)

    def empty(self) -> bool:
        return not any(self._offsets)

    def is_trimmable(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        if self._stack is not None:
            return self._stack.nbytes
        return sum(row.nbytes for row in self._rows)

    @property
    def max_nbytes(self) -> int | None:
        """Bytes that these rows can reach; None if unlimited or still empty."""
        if self._stack is not None:
            return self._stack.max_nbytes
        return total(row.max_nbytes for row in self._rows)

    @property
    def state(self) -> list[Any]:
        """All arrays, to be evaluated."""
        if self._stack is not None:
            return self._stack.arrays
        return [row.state for row in self._rows]

    # Rows

    @property
    def _offsets(self) -> list[int]:
        if self._stack is not None:
            return self._stack.offsets
        return [row.offset for row in self._rows]

    @property
    def _pending(self) -> bool:
        """Whether what comes may hold padding."""
        return self._lengths is not None or any(n > self._done for n in self._left)

    def _steps(self, length: int) -> bool:
        """Whether a chunk of this length is one token for every row."""
        return length == 1 and not self._pending

    def _cut(self, length: int) -> list[Span]:
        """What of the next chunk is each row's own."""
        spans = []
        for i, left in enumerate(self._left):
            start = min(length, max(0, left - self._done))
            stop = length
            if self._lengths is not None:
                end = left + self._lengths[i] - self._done
                stop = min(length, max(start, end))
            spans.append((start, stop))
        return spans

    def _row(self, i: int) -> PolicyKVCache:
        assert self._stack is not None
        made = self._made
        part = self._stack.part(i, made.journal)
        return made.kind.of_slots(part, made.prefill, made.shares)

    def _unstacked(self) -> list[PolicyKVCache]:
        if self._stack is not None:
            self._rows = [self._row(i) for i in range(len(self._stack.offsets))]
            self._stack = None
        return self._rows

    def _update_rows(
        self, keys: mx.array, values: mx.array, module: str
    ) -> tuple[Rows, Rows]:
        rows, length = self._unstacked(), keys.shape[2]
        before = max(row.size() for row in rows)
        self._parts, padded = [], []
        for i, (row, (start, stop)) in enumerate(
            zip(rows, self._cut(length), strict=True)
        ):
            new = (keys[i : i + 1, :, start:stop], values[i : i + 1, :, start:stop])
            first = before + start - row.size()
            if stop > start:
                given = row.update_and_fetch(*new, module=module)
            else:
                given = self._held(row, keys, values)
            queries, columns = slice(start, stop), slice(first, before + stop)
            self._parts.append(_Part(queries, columns, *given))
            padded.append([around(a, first, length - stop) for a in given])
        self._done += length
        self._joined = [join(a, axis=0) for a in zip(*padded, strict=True)]
        return self._joined[0], self._joined[1]

    @staticmethod
    def _held(row: PolicyKVCache, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """A row that gets padding only: what it holds, none of the new rows' kind."""
        if not row.empty():
            return row.slots.held_rows()
        new = row.slots.storage.pack(keys[:1, :, :1], values[:1, :, :1])
        return each(lambda a: a[:, :, :0], new[0]), each(lambda a: a[:, :, :0], new[1])

    def _attend_rows(
        self,
        parts: Sequence[_Part],
        joined: Sequence[Rows],
        queries: mx.array,
        keys: Any,
        values: Any,
        *,
        mask: Any,
        **how: Any,
    ) -> mx.array:
        length = queries.shape[2]
        as_given = keys is joined[0] and values is joined[1]
        outputs = []
        for i, (row, part) in enumerate(zip(self._rows, parts, strict=True)):
            start, stop = part.queries.start, part.queries.stop
            if start == stop:
                shape = (1, queries.shape[1], length, values.shape[3])
                outputs.append(mx.zeros(shape, queries.dtype))
                continue
            mine = (part.keys, part.values)
            if not as_given:
                # A model that made other keys of them, latents for example.
                columns = (slice(i, i + 1), slice(None), part.columns)
                mine = (keys[columns], values[columns])
            output = row.attend(
                queries[i : i + 1, :, part.queries],
                *mine,
                mask=_mask_of_row(mask, i, part),
                **how,
            )
            outputs.append(around(output, start, length - stop))
        return mx.concatenate(outputs)


def _mask_of_row(mask: Any, row: int, part: _Part) -> Any:
    if not isinstance(mask, mx.array):
        return mask
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    if mask.shape[0] > 1:
        mask = mask[row : row + 1]
    # One row for all queries, say: cut only what is there.
    queries = part.queries if mask.shape[2] > 1 else slice(None)
    columns = part.columns if mask.shape[3] > 1 else slice(None)
    return mask[:, :, queries, columns]
