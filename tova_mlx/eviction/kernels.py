"""The eviction as a Metal kernel: a decode step, and the scan of a block.

Both are one recurrence (`policies.base`), so both are one kernel: a step is a scan of
one query, in which every column is held and its slot need not be its age. One
threadgroup per choice of a victim ([B * H'], as in `scan`) goes through the steps:

1. per head, maximum and sum of the exponentials of the columns held; a simdgroup
   takes a head, or, if there are more simdgroups than heads, a part of one;
2. per column, the mean over the heads of its weight, and its new score;
3. the lowest score among the unprotected; that column is evicted from then on.

Float32 inside whatever the logits are. A weight that is not a number counts as 0, so
that the victim is a slot of the cache whatever comes.

Estimated, not measured: a query of 1,280 columns and 32 heads takes 2 x 41 k loads and
exponentials, 20 instructions each, on one core of 128 lanes: 13 k cycles, 9 us; a block
of 256 rows 2 to 3 ms with its 1,000 barriers. A decode step with 512 slots: 4 us.
"""

import functools
from typing import Any

import mlx.core as mx

from ..policies import Rule
from .scan import Columns

# One flag a column in threadgroup memory, 8.25 KiB.
MAX_COLUMNS = 67_584

# 16 simdgroups: enough to hide the loads of the one threadgroup that a layer has, and
# far from the 1,024 that a kernel with more registers cannot be given.
_THREADS = 512
_SIMDGROUPS = _THREADS // 32

_HEADER = """
// By its bits: a comparison may be compiled away.
METAL_FUNC bool tova_is_nan(float x) {
  return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u;
}

// Take the other column if its score is lower, or as low and its position older.
METAL_FUNC void tova_take(
    thread float& score, thread int& position, thread int& column,
    float other_score, int other_position, int other_column) {
  if (other_score < score ||
      (other_score == score && other_position < position)) {
    score = other_score;
    position = other_position;
    column = other_column;
  }
}
"""

_SOURCE = """
  const int tid = int(thread_position_in_threadgroup.x);
  const int lane = int(thread_index_in_simdgroup);
  const int simd = int(simdgroup_index_in_threadgroup);
  const int choice = int(threadgroup_position_in_grid.x);
  const int n_heads = logits_shape[1];
  const int n_steps = logits_shape[2];
  const int n_columns = logits_shape[3];
  const int n_held = n_columns - n_steps;
  const int first_evicting = counts[0];
  const int n_sinks = counts[1];
  const int n_recent = counts[2];
  const int newest_of_all = newest[choice / (n_heads / HEADS)];
  const size_t own = size_t(choice) * n_columns;

  threadgroup float part_top[HEADS * PARTS];
  threadgroup float part_sum[HEADS * PARTS];
  threadgroup float top[HEADS];
  threadgroup float factor[HEADS];
  threadgroup float best_score[SIMDGROUPS];
  threadgroup int best_position[SIMDGROUPS];
  threadgroup int best_column[SIMDGROUPS];

#if !TOVA_BLOCK
  if (tid == 0) victims[choice] = 0u;
#endif
  // A thread keeps to its columns, so what it writes to device memory needs no barrier.
  for (int c = tid; c < n_columns; c += THREADS) {
    new_scores[own + c] = MEMORY ? scores[own + c] : 0.0f;
#if TOVA_BLOCK
    last[own + c] = n_steps;
#endif
  }
#if TOVA_BLOCK
  threadgroup uint evicted[MAX_COLUMNS / 32];
  for (int w = tid; w < (n_columns + 31) / 32; w += THREADS) evicted[w] = 0u;
  threadgroup_barrier(mem_flags::mem_threadgroup);
#define TOVA_HELD(c) ((evicted[(c) >> 5] >> ((c) & 31) & 1u) == 0u)
#else
#define TOVA_HELD(c) true
#endif

  for (int step = 0; step < n_steps; ++step) {
    const int n_seen = n_held + step + 1;
    const bool evicts = step >= first_evicting;
#if TOVA_BEFORE
    const int nth = step - (n_steps - counts[3]);
    if (nth >= 0) {
      const size_t into = (size_t(choice) * counts[3] + nth) * n_columns;
      for (int c = tid; c < n_columns; c += THREADS) {
        before[into + c] = new_scores[own + c];
      }
    }
#endif
    if (!(evicts || MEMORY || step == n_steps - 1)) continue;

    for (int item = simd; item < HEADS * PARTS; item += SIMDGROUPS) {
      const size_t line =
          ((size_t(choice) * HEADS + item / PARTS) * n_steps + step) * n_columns;
      float high = -INFINITY;
      float sum = 0.0f;
      for (int c = item % PARTS * 32 + lane; c < n_seen; c += PARTS * 32) {
        const float x = float(logits[line + c]);
        if (TOVA_HELD(c) && x != -INFINITY) {
          const float higher = high < x ? x : high;
          sum = sum * metal::exp(high - higher) + metal::exp(x - higher);
          high = higher;
        }
      }
      const float highest = simd_max(high);
      // A lane that saw nothing has a sum of 0, and no difference to take.
      sum = simd_sum(high == -INFINITY ? sum : sum * metal::exp(high - highest));
      if (lane == 0) {
        part_top[item] = highest;
        part_sum[item] = sum;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int h = tid; h < HEADS; h += THREADS) {
      const float learned =
          SINKS ? float(sinks[(choice * HEADS + h) % n_heads]) : -INFINITY;
      float highest = learned;
      for (int p = h * PARTS; p < (h + 1) * PARTS; ++p) {
        highest = highest < part_top[p] ? part_top[p] : highest;
      }
      float sum = SINKS ? metal::exp(learned - highest) : 0.0f;
      for (int p = h * PARTS; p < (h + 1) * PARTS; ++p) {
        const float high = part_top[p];
        sum += high == -INFINITY ? part_sum[p]
                                 : part_sum[p] * metal::exp(high - highest);
      }
      top[h] = highest;
      // A head that sees nothing has no weights; as NaN they are left out below.
      factor[h] = highest == -INFINITY ? NAN : 1.0f / sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float lowest = INFINITY;
    int oldest = INT_MAX;
    int victim = 0;
    for (int c = tid; c < n_seen; c += THREADS) {
      if (!TOVA_HELD(c)) continue;
      float received = 0.0f;
      for (int h = 0; h < HEADS; ++h) {
        const int head = choice * HEADS + h;
        const size_t at = (size_t(head) * n_steps + step) * n_columns + c;
        float weight = metal::exp(float(logits[at]) - top[h]) * factor[h];
        if (WEIGHTED) weight *= value_norms[size_t(head / GROUP) * n_columns + c];
        received += weight;
      }
      received *= 1.0f / float(HEADS);
      if (tova_is_nan(received)) received = 0.0f;
      const float score =
          MEMORY ? memory[0] * new_scores[own + c] + received : received;
      new_scores[own + c] = score;
      const int position = positions[own + c];
      if (position >= n_sinks &&
          position <= newest_of_all - (n_steps - 1 - step) - n_recent) {
        tova_take(lowest, oldest, victim, score, position, c);
      }
    }
    if (!evicts) continue;
    for (ushort apart = 16; apart > 0; apart >>= 1) {
      const float other_score = simd_shuffle_xor(lowest, apart);
      const int other_position = simd_shuffle_xor(oldest, apart);
      const int other_column = simd_shuffle_xor(victim, apart);
      tova_take(
          lowest, oldest, victim, other_score, other_position, other_column);
    }
    if (lane == 0) {
      best_score[simd] = lowest;
      best_position[simd] = oldest;
      best_column[simd] = victim;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int s = 0; s < SIMDGROUPS; ++s) {
      tova_take(
          lowest, oldest, victim, best_score[s], best_position[s], best_column[s]);
    }
#if TOVA_BLOCK
    if (tid == victim % THREADS) {
      last[own + victim] = step;
      evicted[victim >> 5] |= 1u << (victim & 31);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#else
    if (tid == 0) victims[choice] = uint(victim);
#endif
  }
"""


@functools.cache
def _kernel(block: bool, before: bool) -> Any:
    outputs = ["new_scores", "last" if block else "victims"]
    inputs = ["logits", "positions", "scores", "value_norms", "sinks", "newest"]
    names = {(False, False): "step", (True, False): "scan", (True, True): "scan_before"}
    return mx.fast.metal_kernel(
        name=f"tova_{names[block, before]}",
        input_names=[*inputs, "counts", "memory"],
        output_names=[*outputs, *(["before"] if before else [])],
        header=f"#define TOVA_BLOCK {block:d}\n#define TOVA_BEFORE {before:d}{_HEADER}",
        source=_SOURCE,
    )


def _launch(
    logits: mx.array,
    known: Columns,
    newest: mx.array,
    rule: Rule,
    *,
    first_evicting: int,
    block: bool,
    n_before: int,
    sinks: mx.array | None,
) -> list[mx.array]:
    """New scores [R, N], then the victims [R] or `last` [R, N], then `before`.

    logits: [B, n_heads, L, N], f16, bf16 or f32; newest: int32, at least [B], the
    position of the last step's token.
    """
    positions, scores, value_norms = known
    batch, n_heads, _, columns = logits.shape
    n_choices = positions.shape[0]
    heads = batch * n_heads // n_choices
    nothing = mx.zeros((1,))
    if rule.memory and scores is None:
        # The kernel reads a score of every column.
        scores = mx.zeros(positions.shape)
    counts = [first_evicting, rule.n_sinks, rule.n_recent, n_before]
    shape = (n_choices, columns)
    shapes = [shape, shape if block else (n_choices,)]
    types = [mx.float32, mx.int32 if block else mx.uint32]
    if n_before:
        shapes.append((n_choices, n_before, columns))
        types.append(mx.float32)
    return _kernel(block, n_before > 0)(
        inputs=[
            logits,
            positions,
            nothing if scores is None else scores,
            nothing if value_norms is None else value_norms,
            nothing if sinks is None else sinks,
            newest,
            mx.array(counts, mx.int32),
            mx.array([rule.memory]),
        ],
        template=[
            ("HEADS", heads),
            ("GROUP", 1 if value_norms is None else n_heads // value_norms.shape[1]),
            ("PARTS", max(1, _SIMDGROUPS // heads)),
            ("THREADS", _THREADS),
            ("SIMDGROUPS", _SIMDGROUPS),
            ("MAX_COLUMNS", MAX_COLUMNS),
            ("MEMORY", bool(rule.memory)),
            ("WEIGHTED", value_norms is not None),
            ("SINKS", sinks is not None),
        ],
        grid=(n_choices * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=shapes,
        output_dtypes=types,
    )


def step_on_gpu(
    logits: mx.array,
    positions: mx.array,
    scores: mx.array | None,
    value_norms: mx.array | None,
    newest: int | mx.array,
    rule: Rule,
    *,
    evicts: bool,
    sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """Scores float32 [B, H', S] after the newest query's logits [B, n_heads, 1, S].

    And the victim uint32 [B, H', 1], or None. positions, scores: [B, H', S], in any
    order; value_norms: [B, n_kv_heads, S]; newest: the position of the newest token, or
    of each batch row's [B, 1, 1].
    """
    batch, heads, columns = positions.shape
    flat = (batch * heads, columns)
    new_scores, victim = _launch(
        logits,
        Columns(
            positions.reshape(flat),
            None if scores is None else scores.reshape(flat),
            value_norms,
        ),
        _per_row(newest, batch),
        rule,
        first_evicting=0 if evicts else 1,
        block=False,
        n_before=0,
        sinks=sinks,
    )
    new_scores = new_scores.reshape(positions.shape)
    return new_scores, victim.reshape(batch, heads, 1) if evicts else None


def _per_row(newest: int | mx.array, batch: int) -> mx.array:
    """Int32, one per step of the batch, and 8 at least.

    MLX compiles a kernel again whenever an input comes to have less than 8 elements or
    ceases to.
    """
    each = mx.broadcast_to(mx.array(newest, mx.int32).reshape(-1), (batch,))
    return mx.pad(each, (0, max(0, 8 - batch)))
