"""The eviction of a decode step as one Metal kernel.

One threadgroup per choice of a victim, [B * H'] of them as in `scan`:

1. per head, maximum and sum of the exponentials of the logits; a simdgroup takes a
   head, or, if there are more simdgroups than heads, a part of one;
2. per column, the mean over the heads of its weight, and its new score;
3. the lowest score among the unprotected is the next victim.

What is known of the newest token, its position, its score and the norm of its value,
is not in the arrays yet: the kernel writes it on the way, so that a step launches
nothing else. Float32 inside whatever the logits are. A weight that is not a number
counts as 0, so that the victim is a slot of the cache whatever comes.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..policies import Rule
from ..policies.metal import BEST, HEADER, LOWEST, SIMDGROUPS, THREADS
from ..storage.fields import Fresh

_SOURCE = f"""
  const int tid = int(thread_position_in_threadgroup.x);
  const int lane = int(thread_index_in_simdgroup);
  const int simd = int(simdgroup_index_in_threadgroup);
  const int choice = int(threadgroup_position_in_grid.x);
  const int n_heads = logits_shape[1];
  const int n_columns = logits_shape[3];
  const bool evicts = counts[0] != 0;
  const int n_sinks = counts[1];
  const int n_recent = counts[2];
  const float scale = factors[0];
  const int newest_position = newest[choice / (n_heads / HEADS)];
  const int fresh = int(slot[choice]);
  const size_t own = size_t(choice) * n_columns;

  threadgroup float part_top[HEADS * PARTS];
  threadgroup float part_sum[HEADS * PARTS];
  threadgroup float top[HEADS];
  threadgroup float factor[HEADS];
#if TOVA_WEIGHTED
  threadgroup float fresh_norm[NORMS];
#endif
{BEST}
  for (int item = simd; item < HEADS * PARTS; item += SIMDGROUPS) {{
    const size_t line = (size_t(choice) * HEADS + item / PARTS) * n_columns;
    float high = -INFINITY;
    float sum = 0.0f;
    for (int c = item % PARTS * 32 + lane; c < n_columns; c += PARTS * 32) {{
      const float x = float(logits[line + c]) * scale;
      if (x != -INFINITY) {{
        const float higher = high < x ? x : high;
        sum = sum * metal::exp(high - higher) + metal::exp(x - higher);
        high = higher;
      }}
    }}
    const float highest = simd_max(high);
    // A lane that saw nothing has a sum of 0, and no difference to take.
    sum = simd_sum(high == -INFINITY ? sum : sum * metal::exp(high - highest));
    if (lane == 0) {{
      part_top[item] = highest;
      part_sum[item] = sum;
    }}
  }}
#if TOVA_WEIGHTED
  const int width = new_values_shape[3];
  for (int k = simd; k < NORMS; k += SIMDGROUPS) {{
    const size_t line = (size_t(choice) * NORMS + k) * width;
    float square = 0.0f;
    for (int d = lane; d < width; d += 32) {{
      const float x = float(new_values[line + d]);
      square += x * x;
    }}
    square = simd_sum(square);
    if (lane == 0) fresh_norm[k] = metal::sqrt(square);
  }}
#endif
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int h = tid; h < HEADS; h += THREADS) {{
    const float learned =
        SINKS ? float(sinks[(choice * HEADS + h) % n_heads]) : -INFINITY;
    float highest = learned;
    for (int p = h * PARTS; p < (h + 1) * PARTS; ++p) {{
      highest = highest < part_top[p] ? part_top[p] : highest;
    }}
    float sum = SINKS ? metal::exp(learned - highest) : 0.0f;
    for (int p = h * PARTS; p < (h + 1) * PARTS; ++p) {{
      const float high = part_top[p];
      sum += high == -INFINITY ? part_sum[p]
                               : part_sum[p] * metal::exp(high - highest);
    }}
    top[h] = highest;
    // A head that sees nothing has no weights; as NaN they are left out below.
    factor[h] = highest == -INFINITY ? NAN : 1.0f / sum;
  }}
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float lowest = INFINITY;
  int oldest = INT_MAX;
  int victim = 0;
  for (int c = tid; c < n_columns; c += THREADS) {{
#if TOVA_WEIGHTED
    for (int k = 0; k < NORMS; ++k) {{
      const size_t at = (size_t(choice) * NORMS + k) * n_columns + c;
      new_norms[at] = c == fresh ? fresh_norm[k] : value_norms[at];
    }}
#endif
    float received = 0.0f;
    for (int h = 0; h < HEADS; ++h) {{
      const size_t at = (size_t(choice) * HEADS + h) * n_columns + c;
      float weight = metal::exp(float(logits[at]) * scale - top[h]) * factor[h];
#if TOVA_WEIGHTED
      // Written by this thread.
      weight *= new_norms[(size_t(choice) * NORMS + h / GROUP) * n_columns + c];
#endif
      received += weight;
    }}
    received *= 1.0f / float(HEADS);
    if (tova_is_nan(received)) received = 0.0f;
    const float before = MEMORY && c != fresh ? scores[own + c] : 0.0f;
    const float score = MEMORY ? factors[1] * before + received : received;
    new_scores[own + c] = score;
    const int position = c == fresh ? newest_position : positions[own + c];
    new_positions[own + c] = position;
    if (position >= n_sinks && position <= newest_position - n_recent) {{
      tova_take(lowest, oldest, victim, score, position, c);
    }}
  }}
  if (!evicts) {{
    if (tid == 0) victims[choice] = 0u;
    return;
  }}
{LOWEST}
  if (tid == 0) victims[choice] = uint(victim);
"""


class Step(NamedTuple):
    """What a step leaves: the next victim, and what is known of all columns.

    victim: uint32 [B, H', 1], or None; scores: float32, and positions: int32,
    [B, H', S]; value_norms: float32 [B, n_kv_heads, S], for value-weighted rules.
    """

    victim: mx.array | None
    scores: mx.array
    positions: mx.array
    value_norms: mx.array | None


def step_on_gpu(
    logits: mx.array,
    positions: mx.array,
    scores: mx.array | None,
    value_norms: mx.array | None,
    fresh: Fresh,
    newest: Sequence[int],
    rule: Rule,
    *,
    evicts: bool,
    scale: float = 1.0,
    sinks: mx.array | None = None,
) -> Step:
    """Return what the newest query's logits [B, n_heads, 1, S] make of the columns.

    positions, scores: [B, H', S], in any order; value_norms: [B, n_kv_heads, S]; of
    the column of the newest token, `fresh`, nothing is read in these three. newest: its
    position, in each row of the batch; scale: of the logits, a factor.
    """
    batch, choosers = positions.shape[:2]
    n_choices, n_heads = batch * choosers, logits.shape[1]
    heads = n_heads // choosers
    weighted = value_norms is not None
    n_kv_heads = value_norms.shape[1] if value_norms is not None else choosers
    slot = slots_of(fresh, n_choices)
    if scores is None:
        scores = mx.zeros(positions.shape) if rule.memory else nothing()
    shapes = [(batch, choosers, 1), positions.shape, positions.shape]
    types = [mx.uint32, mx.float32, mx.int32]
    if value_norms is not None:
        shapes.append(value_norms.shape)
        types.append(mx.float32)
    victim, *known = _kernel(weighted)(
        inputs=[
            logits,
            positions,
            scores,
            nothing() if value_norms is None else value_norms,
            fresh.values if weighted else nothing(),
            nothing() if sinks is None else sinks,
            slot,
            per_row(newest),
            mx.array([int(evicts), rule.n_sinks, rule.n_recent], mx.int32),
            mx.array([scale, rule.memory]),
        ],
        template=[
            # MLX compiles a kernel again whenever one of the same name is given other
            # types, or one of its inputs comes to have less than 8 elements.
            ("LOGITS", logits.dtype),
            ("VALUES", fresh.values.dtype),
            ("FEW", slot.size < 8),
            ("HEADS", heads),
            ("GROUP", n_heads // n_kv_heads),
            ("NORMS", n_kv_heads // choosers),
            ("PARTS", max(1, SIMDGROUPS // heads)),
            ("THREADS", THREADS),
            ("SIMDGROUPS", SIMDGROUPS),
            ("MEMORY", bool(rule.memory)),
            ("SINKS", sinks is not None),
        ],
        grid=(n_choices * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=shapes,
        output_dtypes=types,
    )
    norms = known[2] if weighted else None
    return Step(victim if evicts else None, known[0], known[1], norms)


def slots_of(fresh: Fresh, n: int) -> mx.array:
    """Return the slot of the newest token for each of n choices, uint32."""
    if isinstance(fresh.slot, int):
        return mx.array([fresh.slot] * n, mx.uint32)
    return fresh.slot.astype(mx.uint32).reshape(-1)


def per_row(newest: Sequence[int]) -> mx.array:
    """Int32, one per row of the batch and 8 at least, see `step_on_gpu`."""
    return mx.array([*newest, *[0] * (8 - len(newest))], mx.int32)


def nothing() -> mx.array:
    """Stand for an input that a kernel does not read."""
    return mx.array([0.0])


@functools.cache
def _kernel(weighted: bool) -> Any:
    norms = ["new_norms"] if weighted else []
    return mx.fast.metal_kernel(
        name=f"tova_step{'_weighted' * weighted}",
        input_names=[
            *("logits", "positions", "scores", "value_norms", "new_values", "sinks"),
            *("slot", "newest", "counts", "factors"),
        ],
        output_names=["victims", "new_scores", "new_positions", *norms],
        header=f"#define TOVA_WEIGHTED {weighted:d}{HEADER}",
        source=_SOURCE,
    )
