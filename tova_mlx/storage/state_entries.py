"""Entries and arrays as a state has them, and back, or refused with the reason."""

from typing import Any, TypeGuard

import mlx.core as mx

from .entries import arrays_of, is_plain

# Positions are int32, and there must be some left to go on with.
MOST_TOKENS = 2**31 - 2**20
# Of keys and values: those of models reach thousands.
_LARGEST = 2.0**40
# What models compute in.
_TYPES = (mx.float32, mx.bfloat16, mx.float16)


def to_arrays(entries: Any) -> Any:
    """Return an array, or those of quantised entries; None for None."""
    return entries if entries is None or is_plain(entries) else arrays_of(entries)


def from_arrays(state: Any, form: Any) -> Any:
    """Return the entries of a `to_arrays`; form: their format, None as they come.

    Raises ValueError, TypeError.
    """
    if state is None:
        return None
    if form is not None:
        if isinstance(state, mx.array):
            raise ValueError("entries that are not quantised")
        return form.from_state(state)
    if not isinstance(state, mx.array) or state.ndim != 4:
        raise ValueError("entries that are not of four dimensions")
    if state.dtype not in _TYPES:
        raise ValueError(f"entries of {state.dtype}")
    return state


def is_array(
    array: Any, shape: tuple[int, ...], dtype: mx.Dtype
) -> TypeGuard[mx.array]:
    """Whether it is an array of this shape and type."""
    if not isinstance(array, mx.array):
        return False
    return tuple(array.shape) == shape and array.dtype == dtype


def check_finite(entries: Any, n: int) -> None:
    """Raise ValueError if the first n slots of entries hold what is not a number.

    Or one that products overflow with, which spoils all that follows, too.
    """
    for a in arrays_of(entries):
        known = a[:, :, :n]
        # In half precision the largest is infinity too.
        if not (mx.isfinite(known) & (mx.abs(known) <= _LARGEST)).all().item():
            raise ValueError("keys or values that are not numbers")


def is_count(n: Any) -> TypeGuard[int]:
    """Whether it is a number of tokens that positions can count."""
    return type(n) is int and 0 <= n < MOST_TOKENS
