"""The Metal kernel that copies a token out of all arrays of a layer's slots."""

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .device import kernels_wanted
from .entries import arrays_of, gather, with_arrays

_THREADS = 256

_PART = """
  {
    const int heads = from{i}_shape[1];
    const int width = from{i}_shape[3];
    const int total = from{i}_shape[0] * heads * width;
    const int per_slot = heads / CHOICES;
    for (int e = tid; e < total; e += n_threads) {
      const int line = e / width;
      const size_t place = slot[line / per_slot];
      taken{i}[e] = from{i}[(line * size_t(from{i}_shape[2]) + place) * width
                            + e % width];
    }
  }
"""


def take_slots(entries: Sequence[Any], slot: mx.array) -> list[Any]:
    """Copy one slot, [B, H', 1], of each of several entries [B, H, S(, D)].

    H' is 1 or H of all of them; None stays None. One launch on Metal.
    """
    if not kernels_wanted():
        return [None if e is None else gather(e, slot) for e in entries]
    taken = iter(_take([a for e in entries for a in arrays_of(e)], slot))
    return [
        None if e is None else with_arrays(e, [next(taken) for _ in arrays_of(e)])
        for e in entries
    ]


def _take(arrays: list[mx.array], slot: mx.array) -> list[mx.array]:
    flat = [a.reshape(*a.shape[:3], -1) for a in arrays]
    shapes = [(*a.shape[:2], 1, *a.shape[3:]) for a in arrays]
    most = max(a.size // a.shape[2] for a in flat)
    threads = -(-most // _THREADS) * _THREADS
    # Types and, as MLX passes less than 8 elements otherwise, how many there are: a
    # kernel of the same name is compiled again whenever they change.
    kinds = "_".join(str(a.dtype).rpartition(".")[2] for a in arrays)
    name = f"tova_take_{kinds}{'_few' * (slot.size < 8)}"
    return take_kernel(name, len(arrays))(
        inputs=[slot.astype(mx.uint32).reshape(-1), *flat],
        template=[("CHOICES", slot.shape[1]), ("THREADS", threads)],
        grid=(threads, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=shapes,
        output_dtypes=[a.dtype for a in arrays],
    )


@functools.cache
def take_kernel(name: str, n: int) -> Any:
    """Return the kernel that copies a slot of n arrays [B, H, S, D]."""
    parts = "".join(_PART.replace("{i}", str(i)) for i in range(n))
    return mx.fast.metal_kernel(
        name=name,
        input_names=["slot", *(f"from{i}" for i in range(n))],
        output_names=[f"taken{i}" for i in range(n)],
        source=f"""
  const int tid = int(thread_position_in_grid.x);
  const int n_threads = THREADS;
{parts}""",
    )
