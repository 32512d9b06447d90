"""`keydiff` on Metal: the scores of a decode step, and the evictions of a block.

The scores are a kernel of one threadgroup per KV head. A simdgroup takes a key at a
time, a lane some of its numbers, twice: once for the mean of the unit keys, once for
each one's distance to it. Float32 inside whatever the keys are, and differences before
squares, for keys that share a large constant.

The evictions of a block are one threadgroup per chooser, which goes by the products of
all pairs of directions. One token comes and one goes a step, so every column's product
with the sum of those held changes by two numbers that are known, and the length of the
mean by a few more.
"""

import functools
from typing import Any

import mlx.core as mx

from .base import Rule
from .metal import BEST, HEADER, LOWEST, MAX_COLUMNS, SIMDGROUPS, THREADS

# Of the products of all pairs: 2,896 columns of 8 heads. More go step by step, which is
# slower and takes no more memory than the keys do.
MAX_BYTES = 256 * 2**20

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


_SCAN_SOURCE = f"""
  const int tid = int(thread_position_in_threadgroup.x);
  const int lane = int(thread_index_in_simdgroup);
  const int simd = int(simdgroup_index_in_threadgroup);
  const int choice = int(threadgroup_position_in_grid.x);
  const int n_columns = products_shape[3];
  const int n_steps = counts[0];
  const int first_evicting = counts[1];
  const int n_sinks = counts[2];
  const int n_recent = counts[3];
  const int n_held = n_columns - n_steps;
  const size_t own = size_t(choice) * n_columns;
  const int newest_of_all = positions[own + n_columns - 1];

  threadgroup uint evicted[MAX_COLUMNS / 32];
  // Of each head: products with the sum of those held of who comes and who goes, the
  // sum's square, its product with the centre, how many it is of; and for the scores.
  threadgroup float comes[HEADS];
  threadgroup float goes[HEADS];
  threadgroup float square[HEADS];
  threadgroup float central[HEADS];
  threadgroup float number[HEADS];
  threadgroup float inverse[HEADS];
  threadgroup float factor[HEADS];
  threadgroup float undirected[HEADS];
{BEST}
  for (int w = tid; w < (n_columns + 31) / 32; w += THREADS) evicted[w] = 0u;
  for (int c = tid; c < n_columns; c += THREADS) {{
    last[own + c] = n_steps;
    for (int h = 0; h < HEADS; ++h) {{
      const size_t at = (size_t(choice) * HEADS + h) * n_columns + c;
      along[at] = along_before[at];
    }}
  }}
  for (int h = tid; h < HEADS; h += THREADS) {{
    const size_t at = (size_t(choice) * HEADS + h) * 3;
    square[h] = before[at];
    central[h] = before[at + 1];
    number[h] = before[at + 2];
  }}
  int gone = -1;

  for (int step = 0; step < n_steps; ++step) {{
    const int fresh = n_held + step;
    // A thread keeps to its columns, so what it writes to device memory is its own.
    for (int h = 0; h < HEADS; ++h) {{
      const size_t line = (size_t(choice) * HEADS + h) * n_columns;
      if (tid == fresh % THREADS) comes[h] = along[line + fresh];
      if (gone >= 0 && tid == gone % THREADS) goes[h] = along[line + gone];
    }}
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int h = tid; h < HEADS; h += THREADS) {{
      const size_t line = (size_t(choice) * HEADS + h) * n_columns;
      const size_t product = line * n_columns;
      float sum = square[h] + 2.0f * comes[h] +
          products[product + size_t(fresh) * n_columns + fresh];
      float centre = central[h] + centred[line + fresh];
      float n = number[h] + (directed[line + fresh] ? 1.0f : 0.0f);
      if (gone >= 0) {{
        const size_t of_gone = product + size_t(gone) * n_columns;
        sum += products[of_gone + gone] - 2.0f * goes[h] -
            2.0f * products[of_gone + fresh];
        centre -= centred[line + gone];
        n -= directed[line + gone] ? 1.0f : 0.0f;
      }}
      square[h] = sum;
      central[h] = centre;
      number[h] = n;
      const float share = n > 0.0f ? 1.0f / n : 0.0f;
      const float of_mean =
          squares_of_centres[choice * HEADS + h] + 2.0f * centre * share +
          sum * share * share;
      inverse[h] = share;
      // Of all columns alike, so only where a mean over the heads is taken, and for
      // keys of length 0, does it say anything.
      undirected[h] = 1.0f + of_mean - sum * share * share;
      factor[h] = of_mean > 0.0f ? 0.5f / metal::sqrt(of_mean) : 0.0f;
    }}
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float lowest = INFINITY;
    int oldest = INT_MAX;
    int victim = -1;
    for (int c = tid; c < n_columns; c += THREADS) {{
      float score = 0.0f;
      for (int h = 0; h < HEADS; ++h) {{
        const size_t line = (size_t(choice) * HEADS + h) * n_columns;
        const size_t row = line * n_columns;
        float product = along[line + c] + products[row + size_t(fresh) * n_columns + c];
        if (gone >= 0) product -= products[row + size_t(gone) * n_columns + c];
        along[line + c] = product;
        const float distance = directed[line + c]
            ? squares[line + c] - 2.0f * product * inverse[h]
            : undirected[h];
        score += distance * factor[h];
      }}
      if (tova_is_nan(score)) score = INFINITY;
      const bool dead = (evicted[c >> 5] >> (c & 31) & 1u) != 0u;
      const int position = positions[own + c];
      const int newest = newest_of_all - (n_steps - 1 - step);
      // Who is still to come is newer than the newest.
      const bool free = position >= n_sinks && position <= newest - n_recent;
      if (!dead && free) {{
        tova_take(lowest, oldest, victim, score, position, c);
      }}
    }}
    if (step < first_evicting) {{
      gone = -1;
      continue;
    }}
{LOWEST}
    gone = victim;
    if (victim >= 0 && tid == victim % THREADS) {{
      last[own + victim] = step;
      evicted[victim >> 5] |= 1u << (victim & 31);
    }}
  }}
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
            ("THREADS", THREADS),
            ("SIMDGROUPS", SIMDGROUPS),
        ],
        grid=(heads * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
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


def fits(shape: tuple[int, ...]) -> bool:
    """Return whether the products of all pairs of [B, n_kv_heads, N] columns fit."""
    batch, n_kv_heads, columns = shape
    return columns <= MAX_COLUMNS and 4 * batch * n_kv_heads * columns**2 <= MAX_BYTES


def evictions_on_gpu(
    directions: Any,
    positions: mx.array,
    rule: Rule,
    *,
    first_evicting: int,
    length: int,
) -> mx.array:
    """Return the last step that saw each column, int32 [B, H', N], `length` if held.

    directions: a `keydiff.Directions` of the N columns in order of position, the last
    `length` of which come one a step; positions: int32 [B, H', N]; first_evicting: the
    first step after which one goes.
    """
    batch, n_kv_heads, columns, _ = directions.apart.shape
    choosers = positions.shape[1]
    counted = directions.directed.astype(mx.float32)
    apart = directions.apart * counted[..., None]
    products = apart @ apart.swapaxes(2, 3)
    centred = (apart @ directions.centre.swapaxes(2, 3))[..., 0]
    n_held = columns - length
    held = counted * (mx.arange(columns) < n_held)
    along = (held[:, :, None] @ products)[:, :, 0]
    sums = [(along * held).sum(-1), (centred * held).sum(-1), held.sum(-1)]
    n_choices = batch * choosers
    counts = mx.array([length, first_evicting, rule.n_sinks, rule.n_recent], mx.int32)
    return _scan_kernel()(
        inputs=[
            *(products, directions.squares, directions.directed, centred, along),
            mx.stack(sums, axis=-1),
            directions.centre.square().sum(axis=-1),
            *(positions, counts),
        ],
        template=[
            # As in `scores_on_gpu`.
            ("FEW", columns < 8),
            ("FEWER", batch * n_kv_heads < 8),
            ("FEWEST", batch * n_kv_heads * 3 < 8),
            ("HEADS", n_kv_heads // choosers),
            ("THREADS", THREADS),
            ("SIMDGROUPS", SIMDGROUPS),
            ("MAX_COLUMNS", MAX_COLUMNS),
        ],
        grid=(n_choices * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[positions.shape, (batch, n_kv_heads, columns)],
        output_dtypes=[mx.int32, mx.float32],
    )[0]


@functools.cache
def _scan_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="tova_keydiff_scan",
        input_names=[
            *("products", "squares", "directed", "centred", "along_before", "before"),
            *("squares_of_centres", "positions", "counts"),
        ],
        output_names=["last", "along"],
        header=HEADER,
        source=_SCAN_SOURCE,
    )
