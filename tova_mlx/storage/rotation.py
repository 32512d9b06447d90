"""Rotary positions that start again: a layer's rotation, and when it is moved on.

A model rotates each key by its position as it makes it. Rotations compose, so a key
that is held can be given another position later: back by the old one, on by the new
one. That both are MLX's own makes it exact: the angle of a large position is rounded,
and it is taken back as it was rounded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx

from .entries import Quantized, dequantized

# Tokens between two renumberings.
PERIOD = 256


@dataclass(frozen=True)
class Rotation:
    """What `mx.fast.rope` is called with, but for positions; equal by value.

    dims: how many of a vector's numbers are rotated; freqs: instead of a base.
    """

    dims: int
    traditional: bool
    base: float | None
    scale: float
    freqs: tuple[float, ...] | None = None

    def rotated(self, vectors: mx.array, start: mx.array, stop: mx.array) -> mx.array:
        """Return vectors that are rotated for positions `start`, rotated for `stop`.

        vectors: [B, H, S, head_dim]; start, stop: int32 [B or 1, H', S]; H' is 1 or H.
        """
        batch, heads, n, width = vectors.shape
        shape = (batch, start.shape[1], n)
        groups = shape[1]
        # One row of a batch for each vector that has a position of its own.
        flat = vectors.reshape(batch, groups, heads // groups, n, width).swapaxes(2, 3)
        flat = flat.reshape(-1, heads // groups, 1, width)
        for positions in (-start, stop):
            flat = mx.fast.rope(
                flat,
                self.dims,
                traditional=self.traditional,
                base=self.base,
                scale=self.scale,
                offset=mx.broadcast_to(positions, shape).reshape(-1),
                freqs=self._freqs,
            )
        flat = flat.reshape(batch, groups, n, heads // groups, width)
        return flat.swapaxes(2, 3).reshape(vectors.shape)

    @cached_property
    def _freqs(self) -> mx.array | None:
        return None if self.freqs is None else mx.array(self.freqs, mx.float32)

    def as_json(self) -> list[Any]:
        return [self.dims, self.traditional, self.base, self.scale, self.freqs]

    @classmethod
    def from_json(cls, given: Any) -> "Rotation":
        """Raises ValueError, TypeError for what is not one."""
        dims, traditional, base, scale, freqs = given
        if type(dims) is not int or dims < 2 or dims % 2:
            raise ValueError(f"a rotation of {dims!r} numbers")
        numbers = [scale, *([base] if freqs is None else freqs)]
        if not all(type(a) in (int, float) for a in numbers):
            raise ValueError("a rotation that is not of numbers")
        # Then every angle is a number. Some models have inf among their frequencies.
        if not (
            0 < scale < 1e9
            and all(a >= 1e-9 for a in numbers[1:])
            and (base is None or base < 1e30)
        ):
            raise ValueError("a rotation by angles that are not numbers")
        if freqs is not None and (base is not None or len(freqs) != dims // 2):
            raise ValueError("a rotation of other frequencies")
        freqs = None if freqs is None else tuple(map(float, freqs))
        return cls(dims, bool(traditional), base, float(scale), freqs)


@dataclass(frozen=True)
class Renumbering:
    """When the tokens held get the rotary positions 0, 1, 2 … in order of age.

    That is after every `period` tokens of all that were seen, from `start` on, if
    something was evicted. It depends on nothing else, so chunks of any size see the
    same.

    rotation: how the layer rotates its keys; None: it does not.
    """

    start: int = 0
    period: int = PERIOD
    rotation: Rotation | None = None

    def __str__(self) -> str:
        if not self.start:
            return "compact"
        return f"original up to {self.next_after(self.start - 1):,}, then compact"

    def next_after(self, offset: int) -> int:
        """Return how many tokens are seen at the next renumbering after `offset`."""
        first = -(-self.start // self.period) * self.period
        return max(first, (offset // self.period + 1) * self.period)

    def is_due(self, offset: int) -> bool:
        """Whether it is now, with `offset` tokens seen."""
        return offset % self.period == 0 and offset >= self.start

    def rotated(self, vectors: mx.array, start: mx.array, stop: mx.array) -> mx.array:
        """As `Rotation.rotated`."""
        if self.rotation is None:
            return vectors
        return self.rotation.rotated(vectors, start, stop)

    def as_json(self) -> list[Any]:
        return [self.start, self.period, self.rotation and self.rotation.as_json()]

    @classmethod
    def from_json(cls, given: Any) -> "Renumbering":
        """Raises ValueError, TypeError for what is not one."""
        start, period, rotation = given
        if not (type(start) is type(period) is int and start >= 0 and period > 0):
            raise ValueError(f"renumbering from {start!r} on, every {period!r} tokens")
        rotation = None if rotation is None else Rotation.from_json(rotation)
        return cls(start, period, rotation)


class RotatedEntries(NamedTuple):
    """Quantised keys as they were stored once, to be read at other rotary positions.

    They are dequantised and rotated whenever they are read: what has to be quantised
    again after each renumbering would lose a little every time.

    stored, wanted: int32 [B, H', S, 1].
    """

    keys: Quantized
    stored: mx.array
    wanted: mx.array
    rotation: Rotation

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (*self.keys.arrays, self.stored, self.wanted)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.keys.shape

    def with_arrays(self, arrays: Iterable[mx.array]) -> "RotatedEntries":
        *keys, stored, wanted = arrays
        return self._replace(
            keys=self.keys.with_arrays(keys), stored=stored, wanted=wanted
        )

    def dequantized(self) -> mx.array:
        return self.rotation.rotated(
            dequantized(self.keys), self.stored[..., 0], self.wanted[..., 0]
        )

    def product(self, left: mx.array, transpose: bool) -> mx.array:
        keys = self.dequantized()
        return left @ (keys.swapaxes(2, 3) if transpose else keys)
