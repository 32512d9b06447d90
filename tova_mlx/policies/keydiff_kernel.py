"""The scores of `keydiff` as one Metal kernel, for a decode step.

One threadgroup per KV head. A simdgroup takes a key at a time, a lane some of its
numbers, twice: once for the mean of the unit keys, once for each one's distance to it.
Float32 inside whatever the keys are, and differences before squares, for keys that
share a large constant. A step of 512 keys of 64 numbers: 2 x 64 kB read.
"""

import functools
from typing import Any

import mlx.core as mx

_THREADS = 512
_SIMDGROUPS = _THREADS // 32

_SOURCE = """
  const int tid = int(thread_position_in_threadgroup.x);
  const int lane = int(thread_index_in_simdgroup);
  const int simd = int(simdgroup_index_in_threadgroup);
  const int head = int(threadgroup_position_in_grid.x);
  const int n_columns = keys_shape[2];
  const int row = head / keys_shape[1];

  threadgroup float sums[SIMDGROUPS * WIDTH];
  threadgroup float mean[WIDTH];
  threadgroup int counts[SIMDGROUPS];
  float mine[PER_LANE];
  float total[PER_LANE];
  for (int j = 0; j < PER_LANE; ++j) total[j] = 0.0f;
  int counted = 0;

  for (int c = simd; c < n_columns; c += SIMDGROUPS) {
    if (PARTLY && !held[size_t(row) * n_columns + c]) continue;
    const size_t line = (size_t(head) * n_columns + c) * WIDTH;
    float square = 0.0f;
    for (int j = 0; j < PER_LANE; ++j) {
      const int d = 32 * j + lane;
      mine[j] = d < WIDTH ? float(keys[line + d]) : 0.0f;
      square += mine[j] * mine[j];
    }
    square = simd_sum(square);
    if (!(square > 0.0f)) continue;
    const float inverse = 1.0f / metal::sqrt(square);
    for (int j = 0; j < PER_LANE; ++j) total[j] += mine[j] * inverse;
    ++counted;
  }
  for (int j = 0; j < PER_LANE; ++j) {
    const int d = 32 * j + lane;
    if (d < WIDTH) sums[simd * WIDTH + d] = total[j];
  }
  if (lane == 0) counts[simd] = counted;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int d = tid; d < WIDTH; d += THREADS) {
    float sum = 0.0f;
    int n = 0;
    for (int s = 0; s < SIMDGROUPS; ++s) {
      sum += sums[s * WIDTH + d];
      n += counts[s];
    }
    mean[d] = sum / float(n > 0 ? n : 1);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float of_mean = 0.0f;
  for (int d = lane; d < WIDTH; d += 32) of_mean += mean[d] * mean[d];
  of_mean = simd_sum(of_mean);
  for (int c = simd; c < n_columns; c += SIMDGROUPS) {
    const size_t line = (size_t(head) * n_columns + c) * WIDTH;
    float square = 0.0f;
    for (int j = 0; j < PER_LANE; ++j) {
      const int d = 32 * j + lane;
      mine[j] = d < WIDTH ? float(keys[line + d]) : 0.0f;
      square += mine[j] * mine[j];
    }
    square = simd_sum(square);
    const bool directed = square > 0.0f;
    const float inverse = directed ? 1.0f / metal::sqrt(square) : 0.0f;
    float distance = 0.0f;
    for (int j = 0; j < PER_LANE; ++j) {
      const int d = 32 * j + lane;
      const float apart = d < WIDTH ? mine[j] * inverse - mean[d] : 0.0f;
      distance += apart * apart;
    }
    distance = simd_sum(distance);
    // A key of length 0 has a cosine of 0.
    if (!directed) distance = 1.0f + of_mean;
    if (lane == 0) {
      scores[size_t(head) * n_columns + c] =
          of_mean > 0.0f ? distance / (2.0f * metal::sqrt(of_mean)) : 0.0f;
    }
  }
"""


def scores_on_gpu(keys: mx.array, held: mx.array | None) -> mx.array:
    """Return the scores of keys [B, n_kv_heads, S, D], float32 [B, n_kv_heads, S].

    held: bool [B, 1, S], the slots that hold a token, all if None.
    """
    batch, n_kv_heads, columns, width = keys.shape
    heads = batch * n_kv_heads
    return _kernel()(
        inputs=[keys, mx.array([True]) if held is None else held],
        template=[
            # A kernel of the same name is compiled again when types change, or an
            # input comes to have less than 8 elements.
            ("KEYS", keys.dtype),
            ("FEW", held is not None and held.size < 8),
            ("PARTLY", held is not None),
            ("WIDTH", width),
            ("PER_LANE", -(-width // 32)),
            ("THREADS", _THREADS),
            ("SIMDGROUPS", _SIMDGROUPS),
        ],
        grid=(heads * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(batch, n_kv_heads, columns)],
        output_dtypes=[mx.float32],
    )[0]


@functools.cache
def _kernel() -> Any:
    return mx.fast.metal_kernel(
        name="tova_keydiff",
        input_names=["keys", "held"],
        output_names=["scores"],
        source=_SOURCE,
    )
