"""The choice of a victim by given scores as one Metal kernel.

For policies with a score of their own: one threadgroup per choice takes the mean of
the scores over the KV heads it stands for, and the lowest of those that may go. The
newest token's position is written on the way, as in `step_kernel`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..policies import Rule
from ..policies.metal import BEST, HEADER, LOWEST, SIMDGROUPS, THREADS
from ..storage.fields import Fresh
from .step_kernel import nothing, per_row, slots_of

_SOURCE = f"""
  const int tid = int(thread_position_in_threadgroup.x);
  const int lane = int(thread_index_in_simdgroup);
  const int simd = int(simdgroup_index_in_threadgroup);
  const int choice = int(threadgroup_position_in_grid.x);
  const int n_columns = positions_shape[2];
  const int row = choice / positions_shape[1];
  const int n_sinks = counts[0];
  const int n_recent = counts[1];
  const int newest_position = newest[row];
  const int fresh = int(slot[choice]);
  const size_t own = size_t(choice) * n_columns;
{BEST}
  float lowest = INFINITY;
  int oldest = INT_MAX;
  int victim = 0;
  for (int c = tid; c < n_columns; c += THREADS) {{
    float score = 0.0f;
    for (int h = 0; h < HEADS; ++h) {{
      score += scores[(size_t(choice) * HEADS + h) * n_columns + c];
    }}
    score *= 1.0f / float(HEADS);
    if (tova_is_nan(score)) score = INFINITY;
    const int position = c == fresh ? newest_position : positions[own + c];
    new_positions[own + c] = position;
    const bool there = !PARTLY || held[size_t(row) * n_columns + c];
    if (there && position >= n_sinks && position <= newest_position - n_recent) {{
      tova_take(lowest, oldest, victim, score, position, c);
    }}
  }}
{LOWEST}
  if (tid == 0) victims[choice] = uint(victim);
"""


def choose_on_gpu(
    scores: mx.array,
    positions: mx.array,
    fresh: Fresh,
    newest: Sequence[int],
    rule: Rule,
    held: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the victim, uint32 [B, H', 1], and the positions with the newest token's.

    scores: float32 [B, n_kv_heads, S]; positions: int32 [B, H', S], of the newest
    token's slot nothing is read; newest: its position in each row; held: bool
    [B, 1, S], the slots taken, all if None. A score that is not a number is evicted
    last.
    """
    batch, choosers = positions.shape[:2]
    n_choices = batch * choosers
    slot = slots_of(fresh, n_choices)
    return _kernel()(
        inputs=[
            scores,
            positions,
            nothing() if held is None else held,
            slot,
            per_row(newest),
            mx.array([rule.n_sinks, rule.n_recent], mx.int32),
        ],
        template=[
            # As in `step_on_gpu`.
            ("FEW", slot.size < 8),
            ("PARTLY", held is not None),
            ("HEADS", scores.shape[1] // choosers),
            ("THREADS", THREADS),
            ("SIMDGROUPS", SIMDGROUPS),
        ],
        grid=(n_choices * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(batch, choosers, 1), positions.shape],
        output_dtypes=[mx.uint32, mx.int32],
    )


@functools.cache
def _kernel() -> Any:
    return mx.fast.metal_kernel(
        name="tova_choice",
        input_names=["scores", "positions", "held", "slot", "newest", "counts"],
        output_names=["victims", "new_positions"],
        header=HEADER,
        source=_SOURCE,
    )
