"""A storage format from outside: numbers of 4 bits, 32 to a scale, without a bias."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx

from tova_mlx.storage.format import Format

HOW = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


class Mxfp4Entries(NamedTuple):
    data: mx.array
    scales: mx.array

    @property
    def arrays(self):
        return tuple(self)

    @property
    def shape(self):
        return (*self.data.shape[:3], self.data.shape[3] * 8)

    def with_arrays(self, arrays):
        return Mxfp4Entries(*arrays)

    def dequantized(self):
        return mx.dequantize(*self, **HOW).astype(mx.float32)

    def product(self, left, transpose):
        return mx.quantized_matmul(left, *self, None, transpose=transpose, **HOW)


@dataclass(frozen=True)
class Mxfp4(Format):
    choices: ClassVar = ("mxfp4",)
    choice = "mxfp4"

    @classmethod
    def of(cls, choice, group_size, constant=None):
        return cls()

    def quantize(self, entries):
        return Mxfp4Entries(*mx.quantize(entries, **HOW))

    def from_state(self, arrays):
        data, scales = arrays
        if (data.dtype, scales.dtype) != (mx.uint32, mx.uint8):
            raise ValueError("not entries of mxfp4")
        if data.shape != (*scales.shape[:3], 4 * scales.shape[3]):
            raise ValueError("not entries of mxfp4")
        return Mxfp4Entries(data, scales)
