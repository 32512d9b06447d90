"""Metal source of the three kernels of the prefill scan, see `scan_kernels`.

HEADS: query heads of a chooser; GROUP: query heads per KV head; SINKS: whether there
are learned ones. `own`: where a chooser's columns begin; `line`: its row.
"""

HEADER = """
// By its bits: a comparison may be compiled away.
METAL_FUNC bool tova_is_nan(float x) {
  return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u;
}

METAL_FUNC float tova_number(float x) { return tova_is_nan(x) ? 0.0f : x; }

// Take an exponential into a sum of them that is relative to the highest.
METAL_FUNC void tova_add(thread float& high, thread float& sum, float x) {
  if (x == -INFINITY) return;
  const float higher = high < x ? x : high;
  sum = sum * metal::exp(high - higher) + metal::exp(x - higher);
  high = higher;
}

// The sum over all lanes, in each of them.
METAL_FUNC void tova_join(thread float& high, thread float& sum) {
  const float highest = simd_max(high);
  // A lane that saw nothing has a sum of 0, and no difference to take.
  sum = simd_sum(high == -INFINITY ? sum : sum * metal::exp(high - highest));
  high = highest;
}

// Take the other column if its score is lower, or as low and it is older.
METAL_FUNC void tova_take(
    thread float& score, thread int& column, float other_score, int other_column) {
  if (other_score < score || (other_score == score && other_column < column)) {
    score = other_score;
    column = other_column;
  }
}
"""


def _received(step: str, top: str, total: str) -> str:
    """Metal: what column c gets of the query of a step, as `given`.

    top, total: of head h, the maximum that its exponentials are relative to, and their
    sum. What is not a number counts as 0.
    """
    return f"""
      float given = 0.0f;
      for (int h = 0; h < HEADS; ++h) {{
        const int head = choice * HEADS + h;
        const size_t at = (size_t(head) * n_steps + {step}) * n_columns + c;
        float weight = metal::exp(float(logits[at]) - {top}) / {total};
        if (WEIGHTED) {{
          weight *= tova_number(value_norms[size_t(head / GROUP) * n_columns + c]);
        }}
        given += weight;
      }}
      given = tova_number(given * (1.0f / float(HEADS)));
"""


ROWS_SOURCE = (
    """
  const int tid = int(thread_position_in_threadgroup.x);
  const int lane = int(thread_index_in_simdgroup);
  const int simd = int(simdgroup_index_in_threadgroup);
  const int choice = int(threadgroup_position_in_grid.x);
  const int row = int(threadgroup_position_in_grid.y);
  const int n_heads = logits_shape[1];
  const int n_steps = logits_shape[2];
  const int n_columns = logits_shape[3];
  const int step = counts[0] + row;
  const int n_rows = counts[1];
  const int n_sinks = counts[2];
  const int n_recent = counts[3];
  const int n_seen = n_columns - n_steps + step + 1;
  const size_t own = size_t(choice) * n_columns;
  const size_t line = size_t(choice) * n_rows + row;

#if TOVA_SHARES
  threadgroup float top[HEADS];
  threadgroup float total[HEADS];
#endif

  for (int h = simd; h < HEADS; h += ROW_THREADS / 32) {
    const int head = choice * HEADS + h;
    const size_t from = (size_t(head) * n_steps + step) * n_columns;
    float high = -INFINITY;
    float sum = 0.0f;
    for (int c = lane; c < n_seen; c += 32) {
      if (held_until[own + c] == n_steps) tova_add(high, sum, float(logits[from + c]));
    }
    if (SINKS && lane == 0) tova_add(high, sum, float(sinks[head % n_heads]));
    tova_join(high, sum);
    if (lane == 0) {
      tops[line * HEADS + h] = high;
      sums[line * HEADS + h] = sum;
#if TOVA_SHARES
      top[h] = high;
      total[h] = sum;
#endif
    }
  }

  const int newest = positions[own + n_columns - 1] - (n_steps - 1 - step);
  for (int c = tid; c < n_columns; c += ROW_THREADS) {
    const int position = positions[own + c];
    const int next = c + 1 < n_columns ? positions[own + c + 1] : INT_MAX;
    // In order of position, so those that are not protected lie side by side.
    for (int side = 0; side < 2; ++side) {
      const int limit = side == 0 ? n_sinks - 1 : newest - n_recent;
      if (position <= limit && limit < next) range[line * 2 + side] = c + 1;
      if (c == 0 && limit < position) range[line * 2 + side] = 0;
    }
  }
#if TOVA_SHARES
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int c = tid; c < n_columns; c += ROW_THREADS) {
    float share = 0.0f;
    if (c < n_seen && held_until[own + c] == n_steps) {"""
    + _received("step", "top[h]", "total[h]")
    + """
      share = given;
    }
    shares[line * n_columns + c] = share;
  }
#endif
"""
)

SCORES_SOURCE = (
    """
  const int c = int(thread_position_in_grid.x);
  const int choice = int(thread_position_in_grid.y);
  const int n_steps = logits_shape[2];
  const int n_columns = logits_shape[3];
  const int first = counts[0];
  const int n_rows = counts[1];
  const int n_before = counts[5];
  const size_t own = size_t(choice) * n_columns;
  const bool held = held_until[own + c] == n_steps;

  float score = MEMORY ? scores[own + c] : 0.0f;
  for (int row = 0; row <= n_rows; ++row) {
    const int nth = row - (n_rows - n_before);
    if (nth >= 0) {
      after[(size_t(choice) * (n_before + 1) + nth) * n_columns + c] = score;
    }
    if (row == n_rows) break;
    const size_t line = size_t(choice) * n_rows + row;
    const int step = first + row;
    float gain = 0.0f;
    if (held && c <= n_columns - n_steps + step) {"""
    + _received("step", "tops[line * HEADS + h]", "sums[line * HEADS + h]")
    + """
      gain = given;
    }
    score = MEMORY ? memory[0] * score + gain : gain;
  }
"""
)

SCAN_SOURCE = (
    """
  const int tid = int(thread_position_in_threadgroup.x);
  const int lane = int(thread_index_in_simdgroup);
  const int simd = int(simdgroup_index_in_threadgroup);
  const int choice = int(threadgroup_position_in_grid.x);
  const int n_heads = logits_shape[1];
  const int n_steps = logits_shape[2];
  const int n_columns = logits_shape[3];
  const int n_held = n_columns - n_steps;
  const int first = counts[0];
  const int n_rows = counts[1];
  const int first_evicting = counts[4];
  const size_t own = size_t(choice) * n_columns;

  threadgroup uint evicted[MAX_COLUMNS / 32];
  threadgroup int victims[ROWS];
  // With memory, of all rows so far.
  threadgroup float top[(MEMORY ? ROWS : 1) * HEADS];
  threadgroup float total[(MEMORY ? ROWS : 1) * HEADS];
  threadgroup float ratio[HEADS];
  threadgroup float least[SIMDGROUPS];
  threadgroup float best_score[SIMDGROUPS];
  threadgroup int best_column[SIMDGROUPS];

  // A thread keeps to its columns, so what it writes to device memory needs no barrier.
  for (int c = tid; c < n_columns; c += THREADS) last[own + c] = held_until[own + c];
  for (int w = tid; w < (n_columns + 31) / 32; w += THREADS) {
    uint flags = 0u;
    for (int c = w * 32; c < w * 32 + 32 && c < n_columns; ++c) {
      if (held_until[own + c] != n_steps) flags |= 1u << (c & 31);
    }
    evicted[w] = flags;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#define TOVA_HELD(c) ((evicted[(c) >> 5] >> ((c) & 31) & 1u) == 0u)

  int n_victims = 0;
  float most = 1.0f;
  for (int row = 0; row < n_rows; ++row) {
    const int step = first + row;
    const int n_seen = n_held + step + 1;
    const bool evicts = step >= first_evicting;
    const size_t line = size_t(choice) * n_rows + row;
    const int kept = MEMORY ? row * HEADS : 0;

    // What the evicted leave of the sums.
    for (int h = simd; h < HEADS; h += SIMDGROUPS) {
      const int head = choice * HEADS + h;
      const size_t from = (size_t(head) * n_steps + step) * n_columns;
      const float began = tops[line * HEADS + h];
      const float sum = sums[line * HEADS + h];
      float high = began;
      float gone = 0.0f;
      for (int i = lane; i < n_victims; i += 32) {
        gone += metal::exp(float(logits[from + victims[i]]) - high);
      }
      float rest = sum - simd_sum(gone);
      float more = sum / rest;
      if (tova_is_nan(rest) || rest < sum * LOST) {
        high = -INFINITY;
        rest = 0.0f;
        for (int c = lane; c < n_seen; c += 32) {
          if (TOVA_HELD(c)) tova_add(high, rest, float(logits[from + c]));
        }
        if (SINKS && lane == 0) tova_add(high, rest, float(sinks[head % n_heads]));
        tova_join(high, rest);
        more = sum * metal::exp(began - high) / rest;
      }
      // Not a number, too.
      if (!(more < BOUNDLESS)) more = BOUNDLESS;
      // A head that sees nothing now makes all weights of the row NaN, that is 0.
      if (high == -INFINITY) more = sum > 0.0f ? INFINITY : 1.0f;
      if (lane == 0) {
        top[kept + h] = high;
        total[kept + h] = rest;
        ratio[h] = more;
        left_tops[line * HEADS + h] = high;
        left_sums[line * HEADS + h] = rest;
      }
    }

    // Each lane's column of the lowest bound, of those that may be evicted.
    const int begin = range[line * 2];
    const int end = evicts ? metal::min(range[line * 2 + 1], n_seen) : 0;
    const size_t bounds = size_t(choice) * (n_rows + MEMORY) + row + MEMORY;
    float low = INFINITY;
    int column = n_columns;
    for (int c = tid; c < end; c += THREADS) {
      if (c < begin || !TOVA_HELD(c)) continue;
      tova_take(low, column, lows[bounds * n_columns + c], c);
    }
    const float lowest = simd_min(low);
    if (lane == 0) least[simd] = lowest;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float greatest = 1.0f;
    for (int h = lane; h < HEADS; h += 32) greatest = metal::max(greatest, ratio[h]);
    greatest = simd_max(greatest);
    most = MEMORY ? metal::max(most, greatest) : greatest;
    if (evicts) {
      // Nobody above this has the lowest score.
      float bound = simd_min(lane < SIMDGROUPS ? least[lane] : INFINITY);
      bound = most < BOUNDLESS ? (bound + SLACK) * most * 1.0001f : INFINITY;

      float best = INFINITY;
      // A column whatever comes.
      int victim = n_columns - 1;
      // Each simdgroup takes the exact scores of its columns, the lowest bound first.
      while (true) {
        for (ushort apart = 16; apart > 0; apart >>= 1) {
          const float other_low = simd_shuffle_xor(low, apart);
          const int other_column = simd_shuffle_xor(column, apart);
          tova_take(low, column, other_low, other_column);
        }
        if (column == n_columns || low > bound) break;
        // The bounds hold, but of a row in which a head saw nothing any more.
        if (most < INFINITY && low * 0.9999f - SLACK > best) break;

        // A lane takes a row.
        const int c = column;
        float score = MEMORY ? scores[own + c] : 0.0f;
        for (int from = MEMORY ? 0 : row; from <= row; from += 32) {
          const int own_row = from + lane;
          float gain = 0.0f;
          if (own_row <= row && c <= n_held + first + own_row) {
            const int then = MEMORY ? own_row * HEADS : 0;"""
    + _received("(first + own_row)", "top[then + h]", "total[then + h]")
    + """
            gain = given;
          }
          for (int i = 0; i < 32 && from + i <= row; ++i) {
            const float nth = simd_shuffle(gain, ushort(i));
            score = MEMORY ? memory[0] * score + nth : nth;
          }
        }
        tova_take(best, victim, score, c);

        const float taken = low;
        low = INFINITY;
        column = n_columns;
        for (int next = tid; next < end; next += THREADS) {
          if (next < begin || !TOVA_HELD(next)) continue;
          const float its = lows[bounds * n_columns + next];
          if (its > taken || (its == taken && next > c)) {
            tova_take(low, column, its, next);
          }
        }
      }

      if (lane == 0) {
        best_score[simd] = best;
        best_column[simd] = victim;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int s = 0; s < SIMDGROUPS; ++s) {
        tova_take(best, victim, best_score[s], best_column[s]);
      }
      if (tid == victim % THREADS) {
        last[own + victim] = step;
        evicted[victim >> 5] |= 1u << (victim & 31);
        victims[n_victims] = victim;
      }
      ++n_victims;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
"""
)
