"""Keys that few bits hold well: centred, turned, then quantised.

Keys of many models have a part that all tokens share (a bias of the projection), and
few channels that are far larger than the others; either makes the steps between levels
coarse for all numbers of a group. So the mean key of a layer and head is taken off, and
a Hadamard transform spreads each number over all channels, as in QuaRot (arXiv
2404.00456). A product turns the queries instead of turning the keys back.
"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from .affine import Affine, AffineEntries
from .format import Bits, Format

# Keys at the beginning that a mean leaves out: attention sinks are unlike all others.
_SINKS = 1
# Bits of layers that need more than the others.
_WIDE = 8


class Center:
    """The key of each KV head that is taken off all keys; equal by value.

    array: float32 [1, n_kv_heads, 1, head_dim], of numbers that float16 has; text: the
    same, for JSON.
    """

    def __init__(self, array: np.ndarray):
        half = array.astype("<f2")
        self.text = f"{len(half)}:{base64.b64encode(half.tobytes()).decode()}"
        # No operation of MLX's: threads cannot evaluate what others have begun.
        self.array = mx.array(half.astype(np.float32)[None, :, None])

    @classmethod
    def of_text(cls, text: str) -> "Center":
        """Raises ValueError for what is not the text of one."""
        heads, data = text.split(":")
        array = np.frombuffer(base64.b64decode(data, validate=True), "<f2")
        if not np.isfinite(array).all():
            raise ValueError("a center that is not numbers")
        return cls(array.reshape(int(heads), -1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Center) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Center({hash(self.text) & 0xFFFFFFFF:08x})"

    def __deepcopy__(self, memo: Any) -> "Center":
        # It never changes.
        return self


def can_turn(width: int) -> bool:
    """Whether `mx.hadamard_transform` is right for vectors of this width.

    Of others, 36 and 72 for example, MLX 0.32 refuses some and writes past the end of
    its memory for some.
    """
    odd = width // (width & -width)
    return odd == 1 or (odd in (3, 5, 7) and width % (4 * odd) == 0)


def turn(entries: mx.array) -> mx.array:
    """Return vectors [..., head_dim] turned; as they are if MLX cannot turn them."""
    return mx.hadamard_transform(entries) if can_turn(entries.shape[-1]) else entries


def turn_back(entries: mx.array) -> mx.array:
    """Return the vectors that `turn` turned."""
    width = entries.shape[-1]
    if width & (width - 1) == 0 or not can_turn(width):
        # Its own inverse.
        return turn(entries)
    # MLX's transforms of 12, 20 and 28 are not symmetric.
    return entries @ turn(mx.eye(width)).T


class HadamardEntries(NamedTuple):
    """Keys that were centred, turned and quantised."""

    turned: AffineEntries
    center: Center | None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.turned.arrays

    @property
    def shape(self) -> tuple[int, ...]:
        return self.turned.shape

    def with_arrays(self, arrays: Iterable[mx.array]) -> "HadamardEntries":
        return HadamardEntries(self.turned.with_arrays(arrays), self.center)

    def dequantized(self) -> mx.array:
        entries = turn_back(self.turned.dequantized())
        return entries if self.center is None else entries + self.center.array

    def product(self, left: mx.array, transpose: bool) -> mx.array:
        if transpose:
            result = self.turned.product(turn(left), True)
            if self.center is not None:
                # No softmax sees it, but sinks and soft caps do.
                result = result + left @ self.center.array.swapaxes(2, 3)
            return result
        result = turn_back(self.turned.product(left, False))
        if self.center is not None:
            result = result + left.sum(axis=3, keepdims=True) * self.center.array
        return result


@dataclass(frozen=True)
class Hadamard(Format):
    """The format: that of the turned keys, and what is taken off them before.

    bits: what was asked for; `affine` may have more, see `widened`.
    """

    choices: ClassVar[tuple[Bits, ...]] = ("4h", "5h", "6h", "8h")
    fits: ClassVar[bool] = True
    bits: int
    affine: Affine
    center: Center | None = None

    @classmethod
    def of(
        cls, choice: str, group_size: int, constant: str | None = None
    ) -> "Hadamard":
        bits = int(choice[0])
        made = cls(bits, Affine(bits, group_size))
        if constant is None:
            return made
        wide, _, text = constant.partition(":")
        if wide not in (str(bits), str(_WIDE)):
            raise ValueError(f"keys of {wide} bits for {choice}")
        return cls(bits, Affine(int(wide), group_size), Center.of_text(text))

    @property
    def choice(self) -> str:
        return f"{self.bits}h"

    @property
    def constant(self) -> str | None:
        return self.center and f"{self.affine.bits}:{self.center.text}"

    def fitted(self, entries: mx.array) -> "Hadamard":
        """Take off the mean of these keys [1, n_kv_heads, S, head_dim] from now on."""
        if entries.shape[2] <= _SINKS:
            return self
        mean = entries[0, :, _SINKS:].astype(mx.float32).mean(axis=1)
        return replace(self, center=Center(np.array(mean)))

    def widened(self) -> "Hadamard":
        return replace(self, affine=replace(self.affine, bits=_WIDE))

    def quantize(self, entries: mx.array) -> HadamardEntries:
        entries = entries.astype(mx.float32)
        if self.center is not None:
            entries = entries - self.center.array
        return HadamardEntries(self.affine.quantize(turn(entries)), self.center)

    def from_state(self, arrays: Iterable[Any]) -> HadamardEntries:
        turned = self.affine.from_state(arrays)
        if self.center is not None:
            heads, width = self.center.array.shape[1::2]
            if (turned.shape[1], turned.shape[3]) != (heads, width):
                raise ValueError(f"a center of {heads} heads of {width}")
        return HadamardEntries(turned, self.center)
