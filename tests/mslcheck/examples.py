"""Kernels to try the checker on, with their references, and bugs for them.

`victim` is a decode step in two launches: the mean over heads, then the slot with the
least. `replay` is a scan: one threadgroup repeats a decode step row by row.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

_HEADER = """
// (m, i) <- the smaller of (m, i) and (om, oi), the lower slot of equals. INT_MAX is
// no slot, whatever its score: weights that are not numbers must not leave it.
METAL_FUNC void take_min(thread float& m, thread int& i, float om, int oi) {
  if (om < m || (om == m && oi < i) || i == INT_MAX) {
    m = om;
    i = oi;
  }
}

METAL_FUNC void simd_argmin(thread float& m, thread int& i) {
  for (ushort off = 16; off > 0; off >>= 1) {
    float om = simd_shuffle_down(m, off);
    int oi = simd_shuffle_down(i, off);
    take_min(m, i, om, oi);
  }
}
"""

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
STORE = "if (lane == 0) { sm[sg] = m; si[sg] = idx; }"

_PARTIAL = """
  const uint tid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  const int H = w_shape[0];
  const int cap = w_shape[1];
  const int slot = int(threadgroup_position_in_grid.x * TG + tid);
  float m = INFINITY;
  int idx = INT_MAX;
  if (slot < n && slot < cap) {
    float acc = 0.0f;
    for (int h = 0; h < H; ++h) acc += float(w[size_t(h) * cap + slot]);
    m = acc / float(H);
    idx = slot;
  }
  simd_argmin(m, idx);
  threadgroup float sm[TG / 32];
  threadgroup int si[TG / 32];
  if (lane == 0) { sm[sg] = m; si[sg] = idx; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg == 0) {
    m = lane < TG / 32 ? sm[lane] : INFINITY;
    idx = lane < TG / 32 ? si[lane] : INT_MAX;
    simd_argmin(m, idx);
    if (lane == 0) {
      pm[threadgroup_position_in_grid.x] = m;
      pi[threadgroup_position_in_grid.x] = idx;
    }
  }
"""

_FINAL = """
  const uint tid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  float m = INFINITY;
  int idx = INT_MAX;
  for (int p = int(tid); p < pm_shape[0]; p += TG) take_min(m, idx, pm[p], pi[p]);
  simd_argmin(m, idx);
  threadgroup float sm[TG / 32];
  threadgroup int si[TG / 32];
  if (lane == 0) { sm[sg] = m; si[sg] = idx; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg == 0) {
    m = lane < TG / 32 ? sm[lane] : INFINITY;
    idx = lane < TG / 32 ? si[lane] : INT_MAX;
    simd_argmin(m, idx);
    if (lane == 0) victims[0] = idx;
  }
"""

VICTIM = {"partial": _PARTIAL, "final": _FINAL, "header": _HEADER}


def make_victim(
    sources: Mapping[str, str] = VICTIM, threads: int = 256, grid: int | None = None
) -> Callable[[mx.array, int], mx.array]:
    """From weights [n_heads, slots], the first n taken, to the victim, int32 [1]."""
    partial: Any = mx.fast.metal_kernel(
        name="partial",
        input_names=["w", "n"],
        output_names=["pm", "pi"],
        source=sources["partial"],
        header=sources["header"],
    )
    final: Any = mx.fast.metal_kernel(
        name="final",
        input_names=["pm", "pi"],
        output_names=["victims"],
        source=sources["final"],
        header=sources["header"],
    )
    common: dict[str, Any] = {
        "threadgroup": (threads, 1, 1),
        "template": [("TG", threads)],
    }

    def victim(weights: mx.array, n: int) -> mx.array:
        groups = -(-weights.shape[1] // threads)
        parts = partial(
            inputs=[weights, mx.array(n)],
            output_shapes=[(groups,), (groups,)],
            output_dtypes=[mx.float32, mx.int32],
            grid=(grid or groups * threads, 1, 1),
            **common,
        )
        (result,) = final(
            inputs=parts,
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
            grid=(threads, 1, 1),
            **common,
        )
        return result

    return victim


def victim_reference(weights: np.ndarray[Any, Any], n: int) -> np.ndarray[Any, Any]:
    """In the kernel's order of additions, so that ties are the same."""
    total = np.zeros(n, np.float32)
    for head in weights[:, :n].astype(np.float32):
        total += head
    return np.array([np.argmin(total / np.float32(len(weights)))], np.int32)


_REPLAY = """
  const uint tid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  const int heads = logits_shape[0];
  const int rows = logits_shape[1];
  const int columns = logits_shape[2];
  threadgroup bool alive[N];
  threadgroup float mean[N];
  threadgroup float shared[TG / 32];
  threadgroup int indices[TG / 32];
  for (int c = tid; c < columns; c += TG) alive[c] = true;
  for (int r = 0; r < rows; ++r) {
    const int end = held + r + 1;
    for (int c = tid; c < end; c += TG) mean[c] = 0.0f;
    for (int h = 0; h < heads; ++h) {
      const device float* row = logits + (size_t(h) * rows + r) * columns;
      float top = -INFINITY;
      for (int c = tid; c < end; c += TG) {
        if (alive[c]) top = max(top, row[c]);
      }
      top = simd_max(top);
      if (lane == 0) shared[sg] = top;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      top = simd_max(lane < TG / 32 ? shared[lane] : -INFINITY);
      threadgroup_barrier(mem_flags::mem_threadgroup);  // shared is free again
      float sum = 0.0f;
      for (int c = tid; c < end; c += TG) {
        if (alive[c]) sum += metal::exp(row[c] - top);
      }
      sum = simd_sum(sum);
      if (lane == 0) shared[sg] = sum;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      sum = simd_sum(lane < TG / 32 ? shared[lane] : 0.0f);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int c = tid; c < end; c += TG) {
        if (alive[c]) mean[c] += metal::exp(row[c] - top) / sum;
      }
    }
    float least = INFINITY;
    int index = INT_MAX;
    for (int c = tid; c < end; c += TG) {
      if (alive[c] && mean[c] < least) {
        least = mean[c];
        index = c;
      }
    }
    float lowest = simd_min(least);
    int first = simd_min(least == lowest ? index : INT_MAX);
    if (lane == 0) { shared[sg] = lowest; indices[sg] = first; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    least = lane < TG / 32 ? shared[lane] : INFINITY;
    index = lane < TG / 32 ? indices[lane] : INT_MAX;
    lowest = simd_min(least);
    first = simd_min(least == lowest ? index : INT_MAX);
    if (tid == 0) {
      victims[r] = first;
      alive[first] = false;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next row
  }
"""

REPLAY = {"source": _REPLAY}


def make_replay(
    sources: Mapping[str, str] = REPLAY, threads: int = 64
) -> Callable[[mx.array, int], mx.array]:
    """From logits [n_heads, rows, columns] to the victim after each row, int32 [rows].

    `held` columns are there before the first row and every row adds one.
    """
    kernel: Any = mx.fast.metal_kernel(
        name="replay",
        input_names=["logits", "held"],
        output_names=["victims"],
        source=sources["source"],
    )

    def replay(logits: mx.array, held: int) -> mx.array:
        _, rows, columns = logits.shape
        (victims,) = kernel(
            inputs=[logits, mx.array(held)],
            output_shapes=[(rows,)],
            output_dtypes=[mx.int32],
            grid=(threads, 1, 1),
            threadgroup=(threads, 1, 1),
            template=[("TG", threads), ("N", columns)],
        )
        return victims

    return replay


def replay_reference(logits: np.ndarray[Any, Any], held: int) -> np.ndarray[Any, Any]:
    alive = np.ones(logits.shape[2], bool)
    victims: list[int] = []
    for row in range(logits.shape[1]):
        columns = np.flatnonzero(alive[: held + row + 1])
        weights = np.exp(logits[:, row, columns].astype(np.float64))
        weights /= weights.sum(axis=1, keepdims=True)
        victims.append(int(columns[np.argmin(weights.mean(axis=0))]))
        alive[victims[-1]] = False
    return np.array(victims, np.int32)
