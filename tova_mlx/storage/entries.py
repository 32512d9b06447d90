"""Keys or values of tokens: one array, or quantised, which may take several.

`Entries` below are either. What is done with slots (gathering, writing, joining) is the
same for each array that entries consist of, so code that holds them uses the functions
here and does not ask which it has. Shapes: [B, n_kv_heads, S, head_dim]; H' is 1 or
n_kv_heads.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias, TypeGuard

import mlx.core as mx


class Quantized(Protocol):
    """Entries that are not one array. A storage format is a class like this."""

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What they consist of, each [B, n_kv_heads, S, ·]."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the entries before: [B, n_kv_heads, S, head_dim]."""
        ...

    def with_arrays(self, arrays: Iterable[mx.array]) -> Any:
        """Return entries of the same format that consist of other arrays."""
        ...

    def product(self, left: mx.array, transpose: bool) -> mx.array:
        """Return left @ entries, or left @ entriesᵀ; float32, as `left` is."""
        ...

    def dequantized(self) -> mx.array:
        """Return the entries as one float32 array."""
        ...


Entries: TypeAlias = mx.array | Quantized


def is_plain(entries: Any) -> TypeGuard[mx.array]:
    """Whether entries are one array, as the model made them."""
    return isinstance(entries, mx.array)


def arrays_of(entries: Any) -> tuple[mx.array, ...]:
    """Return the arrays that entries consist of; none for None."""
    if entries is None:
        return ()
    return (entries,) if is_plain(entries) else entries.arrays


def each(function: Callable[..., mx.array], *entries: Any) -> Any:
    """Return the entries that a function gives for each array of these entries."""
    first = entries[0]
    if is_plain(first):
        return function(*entries)
    parts = zip(*map(arrays_of, entries), strict=True)
    return first.with_arrays(function(*part) for part in parts)


def with_arrays(entries: Any, arrays: Iterable[mx.array]) -> Any:
    """Return entries of the same format that consist of these arrays."""
    return next(iter(arrays)) if is_plain(entries) else entries.with_arrays(arrays)


def nbytes(entries: Any) -> int:
    """Return the bytes of entries; 0 for None."""
    return sum(a.nbytes for a in arrays_of(entries))


def first_slots(entries: Any, n: int) -> Any:
    """Return the first n slots of entries; None for None."""
    # A slice of everything is still work for the device.
    if entries is None or entries.shape[2] == n:
        return entries
    return each(lambda a: a[:, :, :n], entries)


def join(entries: Iterable[Any], axis: int = 2) -> Any:
    """Return entries of several, one after the other."""
    return each(lambda *parts: mx.concatenate(list(parts), axis=axis), *entries)


def pad(entries: Any, before: int, after: int) -> Any:
    """Return entries with slots of zeros before and after them."""
    if not (before or after):
        return entries

    def padded(a: mx.array) -> mx.array:
        return mx.pad(a, [(0, 0), (0, 0), (before, after), *[(0, 0)] * (a.ndim - 3)])

    return each(padded, entries)


def to_mlx(array: Any) -> mx.array:
    """NumPy to MLX; MLX's annotations do not name NumPy's arrays."""
    return mx.array(array)


def gather(entries: Any, columns: Any) -> Any:
    """Take columns [B, H', m] of entries [B, H, S(, D)]; H' is 1 or H."""
    if not isinstance(columns, mx.array):
        columns = to_mlx(columns)
    return each(lambda array: _gather(array, columns), entries)


def _gather(array: mx.array, columns: mx.array) -> mx.array:
    if columns.shape[0] == columns.shape[1] == 1:
        taken = mx.take(array, columns.reshape(-1), axis=2)
        # `take` gives a transposed layout, which every later product would copy.
        return mx.contiguous(taken)
    index = columns.reshape(*columns.shape, *[1] * (array.ndim - 3))
    shape = (*array.shape[:2], columns.shape[2], *array.shape[3:])
    return mx.take_along_axis(array, mx.broadcast_to(index, shape), axis=2)


def write(entries: Any, new: Any, slot: mx.array | int) -> Any:
    """Write new entries [B, H, n(, D)] into slots of entries [B, H, S(, D)], in place.

    slot: [B, H', 1], where the one new token of each goes; [1], where that of all goes;
    or a number, from which on n new ones go. MLX writes into the same buffer as long as
    this is the only reference to it.
    """
    return each(lambda array, some: _write(array, some, slot), entries, new)


def _write(array: mx.array, new: mx.array, slot: mx.array | int) -> mx.array:
    # MLX gives what is new the type that is there: scales of a file may be of another.
    if isinstance(slot, int):
        written = array[...]  # another handle: assigning changes what it stands for
        written[:, :, slot : slot + new.shape[2]] = new
        return written
    if slot.ndim == 1:
        return mx.slice_update(array, new, slot, (2,))
    slot = slot.reshape(*slot.shape, *[1] * (new.ndim - 3))
    return mx.put_along_axis(array, mx.broadcast_to(slot, new.shape), new, axis=2)


def after(entries: Any, read: list[mx.array]) -> Any:
    """Return the same entries, evaluated after `read` was."""
    if not read:
        return entries
    return each(lambda a: mx.depends([a], read)[0], entries)


def dequantized(entries: Any) -> mx.array:
    """Return entries as one float32 array."""
    return entries.astype(mx.float32) if is_plain(entries) else entries.dequantized()


def product(left: mx.array, entries: Any, *, transpose: bool) -> mx.array:
    """Return left @ entries, or left @ entriesᵀ, float32 [B, n_kv_heads, ·, ·]."""
    left = left.astype(mx.float32)
    if not is_plain(entries):
        return entries.product(left, transpose)
    entries = entries.astype(mx.float32)
    return left @ (entries.swapaxes(2, 3) if transpose else entries)
