"""MLX's affine quantisation: a scale and a bias for every few numbers of a token."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from ..errors import OptionError
from .device import on_gpu
from .format import Bits, Format

# On the CPU MLX's quantised product takes 12 to 20 times as long as dequantising and a
# plain product, unless it is of very few queries; then tiles of slots are dequantised.
_FEW = 16
_TILE = 256
# Of scales and biases, whatever the model computes in: bfloat16 has too few digits to
# say where a group begins, float32 would take twice the bytes for it.
_SCALES = mx.float16


class AffineEntries(NamedTuple):
    """Entries quantised along their last axis, as `mx.quantize` gives them."""

    data: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return tuple(self[:3])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:3], self.data.shape[3] * 32 // self.bits)

    def with_arrays(self, arrays: Iterable[mx.array]) -> "AffineEntries":
        data, scales, biases = arrays
        return AffineEntries(data, scales, biases, self.bits, self.group_size)

    def dequantized(self) -> mx.array:
        return self._dequantized(*self.arrays)

    def product(self, left: mx.array, transpose: bool) -> mx.array:
        if left.shape[2] > _FEW and not on_gpu():
            return self._tiled(left, transpose)
        return mx.quantized_matmul(
            left,
            *_in_float32(*self.arrays),
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
        )

    def _dequantized(self, *arrays: mx.array) -> mx.array:
        return mx.dequantize(
            *_in_float32(*arrays), group_size=self.group_size, bits=self.bits
        )

    def _tiled(self, left: mx.array, transpose: bool) -> mx.array:
        """The same product, a tile of slots dequantised at a time."""
        parts = []
        for start in range(0, self.shape[2], _TILE):
            stop = min(start + _TILE, self.shape[2])
            some = self._dequantized(*(a[:, :, start:stop] for a in self.arrays))
            if transpose:
                parts.append(left @ some.swapaxes(2, 3))
            else:
                parts.append(left[..., start:stop] @ some)
        if transpose:
            return mx.concatenate(parts, axis=3)
        return functools.reduce(mx.add, parts)


def _in_float32(data: mx.array, *scales: mx.array) -> tuple[mx.array, ...]:
    return (data, *(a.astype(mx.float32) for a in scales))


@dataclass(frozen=True)
class Affine(Format):
    """The format: how many bits a number, and how many numbers share a scale."""

    choices: ClassVar[tuple[Bits, ...]] = (4, 5, 6, 8)
    bits: int
    group_size: int

    @classmethod
    def of(cls, choice: int, group_size: int, constant: None = None) -> "Affine":
        if constant is not None:
            raise ValueError(f"{choice} bits have no constant")
        return cls(choice, group_size)

    @property
    def choice(self) -> int:
        return self.bits

    def quantize(self, entries: mx.array) -> AffineEntries:
        if entries.shape[3] % self.group_size:
            raise OptionError(
                f"kv_group_size={self.group_size} does not divide rows of "
                f"{entries.shape[3]}. Use 32, or leave kv_bits out."
            )
        arrays = mx.quantize(
            entries.astype(_SCALES), group_size=self.group_size, bits=self.bits
        )
        return AffineEntries(*arrays, self.bits, self.group_size)

    def from_state(self, arrays: Any) -> AffineEntries:
        """Return the entries that these arrays are. Raises ValueError, TypeError."""
        data, scales, biases = arrays
        if not all(isinstance(a, mx.array) and a.ndim == 4 for a in arrays):
            raise ValueError(f"not entries of {self.bits} bits")
        entries = AffineEntries(data, scales, biases, self.bits, self.group_size)
        width = entries.shape[3]
        groups = (*entries.shape[:3], width // self.group_size)
        if (
            data.dtype != mx.uint32
            or not mx.issubdtype(scales.dtype, mx.floating)
            or scales.dtype != biases.dtype
            or width % self.group_size
            or scales.shape != groups
            or biases.shape != groups
        ):
            raise ValueError(
                f"not entries of {self.bits} bits in groups of {self.group_size}"
            )
        return entries
