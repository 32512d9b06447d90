"""Batch rows of unequal length in one cache: mlx-lm's batch protocol.

Each row is what it would be alone. While prompts are read, every row is a cache of its
own: victims are chosen row by row anyway. While one token a row is decoded, all rows
lie in one `Stack` and a step is one operation. Padding is cut off before it comes to a
row, so it can neither attend, be attended to, take a slot nor be evicted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..attention.arguments import AttentionArgs
from ..attention.evict import attend_and_evict, left_to_kernel
from ..attention.softmax import attend_newest
from ..errors import CacheStateError
from ..hooks.layers import total
from ..storage.entries import Entries, arrays_of, each, join, pad, to_mlx
from ..storage.fields import tokens_held
from ..storage.stack import Stack, step_mask
from .base import Pending, PolicyCache, calling_module
from .parts import Part, mask_of_row
from .refusals import attended_again, check_alike, check_values

if TYPE_CHECKING:
    from .layer import PolicyKVCache

# The part of a chunk that is a row's own: from, to.
Span = tuple[int, int]


class BatchPolicyKVCache(PolicyCache):
    """Caches of one row each, as one cache of a layer.

    Made by `merge`, as mlx-lm's `BatchGenerator` does. `offset` is an array here: the
    position of the next token, int32 [B].
    """

    def __init__(self, rows: Sequence[PolicyKVCache]):
        super().__init__(rows[0].rule, rows[0].shares)
        self._rows = list(rows)
        self._stack: Stack | None = None
        self.kind, self.options = type(rows[0]), rows[0].options
        # Padding on the left, and own tokens after it (None: all that come), per row;
        # how much of both has come.
        self._left = [0] * len(self._rows)
        self._lengths: list[int] | None = None
        self._done = 0
        # What the last update gave, row by row and joined, until it is attended to.
        self._parts: list[Part] = []
        self._joined: list[Entries] = []

    @classmethod
    def merge(cls, caches: Sequence[PolicyKVCache]) -> BatchPolicyKVCache:
        """A batch of copies of these caches.

        Raises CacheStateError: caches of different rules, or of several rows.
        """
        first = caches[0]
        for cache in caches:
            check_alike(_made(first), _made(cache))
            if cache.keys is not None and cache.keys.shape[0] != 1:
                raise CacheStateError(
                    f"{first.rule.policy}: a cache of {cache.keys.shape[0]} rows "
                    "cannot be a row of a batch. Use caches of one row."
                )
        return cls([copy.deepcopy(c) for c in caches])

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}({self.rule.max_size}, {self.rule.policy!r}): "
            f"{len(self._offsets)} rows, holds {self.size()} of "
            f"{max(self._offsets, default=0)} tokens at most, {self.nbytes:,} bytes>"
        )

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

    def extend(self, other: BatchPolicyKVCache) -> None:
        """Take in the rows of another batch, behind one's own."""
        if self._pads or other._pads:
            raise CacheStateError(
                f"{self.rule.policy}: rows cannot join while padded prompts are read. "
                "Call finalize first."
            )
        check_alike(_made(self), _made(other))
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
    def seen(self) -> mx.array:
        """How many tokens each row has seen, int32 [B]."""
        return mx.array(self._offsets, mx.int32)

    @property
    def offset(self) -> mx.array:
        """The rotary position of each row's next token, int32 [B].

        Below 0 in padding.
        """
        ahead = [max(0, left - self._done) for left in self._left]
        return mx.array([o - a for o, a in zip(self._rotary, ahead, strict=True)])

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

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[Entries, Entries]:
        """Store new keys and values [B, n_kv_heads, L, head_dim]; return all to see."""
        length = keys.shape[2]
        self._check_attended(length)
        # Before anything is written: a second reference turns a write into a copy.
        self._shared.forget()
        self._parts, self._joined = [], []
        module = calling_module()
        self._pending = Pending(module, max(self._offsets, default=0))
        if not self._steps(length):
            return self._shared.give(self._update_rows(keys, values, module))
        if self._stack is None:
            parts = [row.slots for row in self._rows]
            self._stack, self._rows = Stack(parts, keys, values), []
        # Changed apart and put in place at the end: what fails leaves no trace.
        stack = self._stack.twin()
        given = stack.append(keys, values, settle=not left_to_kernel(self.rule, 1))
        self._stack = stack
        return self._shared.give(given)

    def _attend(
        self, queries: mx.array, keys: Entries, values: Entries, args: AttentionArgs
    ) -> mx.array:
        if self._stack is None:
            attend = partial(self._attend_rows, self._parts, self._joined)
            self._shared.attend_with(attend)
            output = attend(queries, keys, values, args)
            self._parts, self._joined = [], []
            return output
        if self.rule.by_age:
            output = attend_newest(queries, keys, values, args)[0]
            output = self._stack.tied(output)
        else:
            assert self._pending is not None
            check_values(self._pending.module, self.rule, self._stack.values, values)
            stack = self._stack.twin()
            output = attend_and_evict(stack, queries, keys, values, args)
            self._stack = stack
        if self._stack.renumbers:
            # Seldom, and of some rows.
            for row in self._unstacked():
                row.slots.renumber()
        return output

    def keys_and_values(self) -> tuple[Entries, Entries]:
        """What the last update gave, for a layer that shares it."""
        if self._shared.entries is None:
            raise attended_again(self.rule)
        return self._shared.entries

    # What is held

    def size(self) -> int:
        """Tokens held by the row that holds most."""
        return tokens_held(max(self._offsets, default=0), self.rule.max_size)

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
            return [a for e in self._stack.arrays for a in arrays_of(e)]
        return [row.state for row in self._rows]

    # Rows

    @property
    def _offsets(self) -> list[int]:
        if self._stack is not None:
            return self._stack.offsets
        return [row.seen for row in self._rows]

    @property
    def _rotary(self) -> list[int]:
        """The rotary position of each row's next token."""
        if self._stack is not None:
            pairs = zip(self._stack.offsets, self._stack.shifts, strict=True)
            return [offset - shift for offset, shift in pairs]
        return [row.offset for row in self._rows]

    @property
    def _pads(self) -> bool:
        """Whether what comes may hold padding."""
        return self._lengths is not None or any(n > self._done for n in self._left)

    def _steps(self, length: int) -> bool:
        """Whether a chunk of this length is one token for every row."""
        if length != 1 or self._pads or self.options.recall:
            # Each row has an archive of its own.
            return False
        # Rows that pin their first tokens, each its own, have rules of their own.
        return all(row.rule == self._rows[0].rule for row in self._rows[1:])

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
        part = self._stack.part(i, self.options.journal)
        return self.kind.of(self.options, part, self.shares)

    def _unstacked(self) -> list[PolicyKVCache]:
        if self._stack is not None:
            self._rows = [self._row(i) for i in range(len(self._stack.offsets))]
            self._stack = None
        return self._rows

    def _update_rows(
        self, keys: mx.array, values: mx.array, module: str
    ) -> tuple[Entries, Entries]:
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
            self._parts.append(Part(queries, columns, *given))
            padded.append([pad(a, first, length - stop) for a in given])
        self._done += length
        self._joined = [join(a, axis=0) for a in zip(*padded, strict=True)]
        return self._joined[0], self._joined[1]

    @staticmethod
    def _held(row: PolicyKVCache, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """What a row that gets padding only holds; none, of the kind stored, if new."""
        if not row.empty():
            return row.slots.held_entries()
        new = row.slots.storage.store(keys[:1, :, :1], values[:1, :, :1])
        return each(lambda a: a[:, :, :0], new[0]), each(lambda a: a[:, :, :0], new[1])

    def _attend_rows(
        self,
        parts: Sequence[Part],
        joined: Sequence[Entries],
        queries: mx.array,
        keys: Any,
        values: Any,
        args: AttentionArgs,
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
                scale=args.scale,
                mask=mask_of_row(args.mask, i, part),
                sinks=args.sinks,
            )
            outputs.append(pad(output, start, length - stop))
        return mx.concatenate(outputs)


def _made(cache: PolicyKVCache | BatchPolicyKVCache) -> dict[str, Any]:
    """How a cache, or the rows of a batch, were made."""
    kind = cache.kind if isinstance(cache, BatchPolicyKVCache) else type(cache)
    return {"kind": kind, "shares": cache.shares, **vars(cache.options)}
