"""What a storage format is: a way to quantise keys or values."""

from collections.abc import Iterable
from typing import Any, ClassVar, TypeAlias

import mlx.core as mx

from .entries import Quantized

# What stands for a format in the option `kv_bits`, as in 4 or "mxfp4".
Bits: TypeAlias = int | str


class Format:
    """Base of formats, which are frozen dataclasses, so that equal ones are equal.

    Attributes:
        choices: what stands for its kinds in `kv_bits`.
        choice: the one that stands for this kind.
        fits: whether `fitted` gives another.
        constant: what it was fitted to, as text, or None; `of` takes it back.
    """

    choices: ClassVar[tuple[Bits, ...]]
    choice: Any
    fits: ClassVar[bool] = False
    constant: Any = None

    @classmethod
    def of(cls, choice: Any, group_size: int, constant: Any = None) -> "Format":
        """Return the kind that a choice stands for.

        group_size: how many numbers share a scale. Raises ValueError: no constant of
        this format.
        """
        raise NotImplementedError

    def fitted(self, entries: mx.array) -> "Format":
        """Return the same format, fitted to entries such as it will be given."""
        return self

    def widened(self) -> "Format":
        """Return one of the same kind with more bits, for a layer that needs them."""
        return self

    def quantize(self, entries: mx.array) -> Quantized:
        """Return entries [B, n_kv_heads, S, head_dim]. Raises OptionError."""
        raise NotImplementedError

    def from_state(self, arrays: Iterable[Any]) -> Quantized:
        """Return the entries of these arrays. Raises ValueError, TypeError."""
        raise NotImplementedError
