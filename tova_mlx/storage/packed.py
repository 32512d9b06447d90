"""Rows of keys or values as one array, or quantised: packed, with scales and biases.

What is done with slots (gathering, writing, joining) is the same for each of the
arrays, so code that keeps rows uses `each` and does not ask which it has.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import OptionError

# On the CPU MLX's quantised product takes 12 to 20 times as long as unpacking and a
# plain product, unless it is of very few rows; then slots are unpacked in tiles.
_FEW = 16
_TILE = 256


class Packed(NamedTuple):
    """Rows quantised along their last axis, as `mx.quantize` gives them."""

    data: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the rows before: [B, n_kv_heads, slots, head_dim]."""
        return (*self.data.shape[:3], self.data.shape[3] * 32 // self.bits)


Rows = mx.array | Packed


def arrays(rows: Rows | None) -> tuple[mx.array, ...]:
    """The arrays that rows consist of."""
    if rows is None:
        return ()
    return tuple(rows[:3]) if isinstance(rows, Packed) else (rows,)


def each(function: Callable[..., mx.array], *rows: Any) -> Any:
    """The rows that a function of arrays gives for each array of these rows."""
    first = rows[0]
    if not isinstance(first, Packed):
        return function(*rows)
    parts = zip(*(r[:3] for r in rows), strict=True)
    data, scales, biases = (function(*p) for p in parts)
    return Packed(data, scales, biases, first.bits, first.group_size)


def join(rows: Iterable[Rows], axis: int = 2) -> Any:
    """Rows of several, one after the other."""
    return each(lambda *parts: mx.concatenate(list(parts), axis=axis), *rows)


def around(rows: Any, before: int, after: int) -> Any:
    """Rows with slots of zeros before and after them."""

    def pad(a: mx.array) -> mx.array:
        return mx.pad(a, [(0, 0), (0, 0), (before, after), *[(0, 0)] * (a.ndim - 3)])

    return each(pad, rows)


def to_mlx(array: Any) -> mx.array:
    """NumPy to MLX; MLX's annotations do not name NumPy's arrays."""
    return mx.array(array)


def gather(rows: Any, columns: Any) -> Any:
    """Take columns [B, H', m] of rows [B, H, S(, D)]; H' is 1 or H."""
    if not isinstance(columns, mx.array):
        columns = to_mlx(columns)
    return each(lambda array: _gather(array, columns), rows)


def _gather(array: mx.array, columns: mx.array) -> mx.array:
    if columns.shape[0] == columns.shape[1] == 1:
        taken = mx.take(array, columns.reshape(-1), axis=2)
        # `take` gives a transposed layout, which every later product would copy.
        return mx.contiguous(taken)
    index = columns.reshape(*columns.shape, *[1] * (array.ndim - 3))
    shape = (*array.shape[:2], columns.shape[2], *array.shape[3:])
    return mx.take_along_axis(array, mx.broadcast_to(index, shape), axis=2)


def put(rows: Any, new: Any, slot: mx.array) -> Any:
    """Write new rows [B, H, 1(, D)] into slots [B, H', 1] of rows [B, H, S(, D)]."""
    return each(lambda array, row: _put(array, row, slot), rows, new)


def _put(array: mx.array, rows: mx.array, slot: mx.array) -> mx.array:
    slot = slot.reshape(*slot.shape, *[1] * (rows.ndim - 3))
    return mx.put_along_axis(array, mx.broadcast_to(slot, rows.shape), rows, axis=2)


def unpacked(rows: Rows) -> mx.array:
    """The rows in float32, as one array."""
    if not isinstance(rows, Packed):
        return rows.astype(mx.float32)
    arrays = (rows.data, rows.scales, rows.biases)
    plain = mx.dequantize(*arrays, group_size=rows.group_size, bits=rows.bits)
    return plain.astype(mx.float32)


def nbytes(rows: Rows | None) -> int:
    return sum(a.nbytes for a in arrays(rows))


class Storage(NamedTuple):
    """How keys and values are kept: bits, or None as they come; values per scale."""

    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int = 64

    def pack(self, keys: Any, values: Any) -> tuple[Rows, Rows]:
        return (
            _quantized(keys, self.key_bits, self.group_size),
            _quantized(values, self.value_bits, self.group_size),
        )


def storage(kv_bits: Any, kv_group_size: Any) -> Storage:
    """From the public options. Raises OptionError."""
    if kv_bits is None:
        return Storage()
    pair = kv_bits if isinstance(kv_bits, (tuple, list)) else (kv_bits, kv_bits)
    known = all(isinstance(b, int) and b in (4, 8) for b in pair)
    if len(pair) != 2 or not known:
        raise OptionError(
            f"kv_bits={kv_bits!r} is not possible. Use 4, 8 or a pair for keys and "
            "values like (8, 4)."
        )
    if kv_group_size not in (32, 64):
        raise OptionError(
            f"kv_group_size={kv_group_size!r} is not possible. Use 32 or 64."
        )
    return Storage(pair[0], pair[1], kv_group_size)


def product(left: mx.array, rows: Rows, *, transpose: bool) -> mx.array:
    """left @ rows, or left @ rowsᵀ, float32 [B, n_kv_heads, ·, ·]."""
    left = left.astype(mx.float32)
    if not isinstance(rows, Packed):
        rows = rows.astype(mx.float32)
        return left @ (rows.swapaxes(2, 3) if transpose else rows)
    if left.shape[2] > _FEW and not mx.metal.is_available():
        return _tiled(left, rows, transpose)
    return mx.quantized_matmul(
        left,
        rows.data,
        rows.scales.astype(mx.float32),
        rows.biases.astype(mx.float32),
        transpose=transpose,
        group_size=rows.group_size,
        bits=rows.bits,
    )


def _tiled(left: mx.array, rows: Packed, transpose: bool) -> mx.array:
    """The same product, a tile of slots unpacked at a time."""
    slots = rows.data.shape[2]
    parts = []
    for start in range(0, slots, _TILE):
        stop = min(start + _TILE, slots)
        some = mx.dequantize(
            *(a[:, :, start:stop] for a in rows[:3]),
            group_size=rows.group_size,
            bits=rows.bits,
        ).astype(mx.float32)
        if transpose:
            parts.append(left @ some.swapaxes(2, 3))
        else:
            parts.append(left[..., start:stop] @ some)
    if transpose:
        return mx.concatenate(parts, axis=3)
    return functools.reduce(mx.add, parts)


def _quantized(rows: Any, bits: int | None, group_size: int) -> Rows:
    if bits is None:
        return rows
    if rows.shape[3] % group_size:
        raise OptionError(
            f"kv_group_size={group_size} does not divide rows of {rows.shape[3]}. Use "
            "32, or leave kv_bits out."
        )
    data, scales, biases = mx.quantize(rows, group_size=group_size, bits=bits)
    return Packed(data, scales, biases, bits, group_size)
