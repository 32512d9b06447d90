"""Between MLX's arrays and the buffers of a kernel."""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .record import Record
from .run import Argument

Array = np.ndarray[Any, Any]


def to_numpy(array: mx.array) -> Array:
    """The array's own memory and strides; bfloat16 as uint16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    mx.eval(array)
    return np.array(array, copy=False)


def to_mlx(array: Array, dtype: mx.Dtype) -> mx.array:
    result = mx.array(array)  # pyright: ignore[reportArgumentType]
    return result.view(dtype) if dtype == mx.bfloat16 else result


def inputs(
    names: Sequence[str], arrays: Sequence[mx.array], call: Record
) -> Iterator[Argument]:
    """In MLX's order: each array, then what the source asks for of its shape."""
    for name, array, wanted in zip(names, arrays, call.wanted, strict=True):
        numpy = to_numpy(array)
        if call.ensure_row_contiguous:
            numpy = np.ascontiguousarray(numpy).reshape(array.shape)
        yield Argument(name, _memory(numpy))
        if not array.ndim:
            continue
        shape, strides, ndim = wanted
        if shape:
            yield Argument(f"{name}_shape", np.array(numpy.shape, np.int32))
        if strides:
            steps = [step // numpy.itemsize for step in numpy.strides]
            yield Argument(f"{name}_strides", np.array(steps, np.int64))
        if ndim:
            yield Argument(f"{name}_ndim", np.array([numpy.ndim], np.int32))


def output(
    name: str, shape: Sequence[int], dtype: mx.Dtype, init_value: float | None
) -> Argument:
    """A fresh output; without an init_value it starts as NaN or -1."""
    # `mx.full(..., dtype=mx.bool_)` is int32.
    filled = to_numpy(mx.full(shape, init_value or 0).astype(dtype)).copy()
    if init_value is None:
        filled.reshape(-1).view(np.uint8).fill(0xFF)
    return Argument(name, filled, is_output=True, is_filled=init_value is not None)


def _memory(array: Array) -> Array:
    """All elements between the array's first and last, in one row."""
    if array.flags.c_contiguous:
        return array.reshape(-1)
    steps = zip(array.shape, array.strides, strict=True)
    span = 1 + sum((n - 1) * step for n, step in steps) // array.itemsize
    strided = np.lib.stride_tricks.as_strided(array, (span,), (array.itemsize,))
    return np.ascontiguousarray(strided)
