"""Metal source of the two kernels of the prefill scan, see `scan_kernels`.

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

ROWS_SOURCE = """
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

  threadgroup float top[HEADS];
  threadgroup float factor[HEADS];

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
      top[h] = high;
      factor[h] = 1.0f / (sum * float(HEADS));
      tops[line * HEADS + h] = high;
      sums[line * HEADS + h] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int newest = positions[own + n_columns - 1] - (n_steps - 1 - step);
  for (int c = tid; c < n_columns; c += ROW_THREADS) {
    const bool held = c < n_seen && held_until[own + c] == n_steps;
    const int position = positions[own + c];
    const int next = c + 1 < n_columns ? positions[own + c + 1] : INT_MAX;
    // In order of position, so those that are not protected lie side by side.
    for (int side = 0; side < 2; ++side) {
      const int limit = side == 0 ? n_sinks - 1 : newest - n_recent;
      if (position <= limit && limit < next) range[line * 2 + side] = c + 1;
      if (c == 0 && limit < position) range[line * 2 + side] = 0;
    }
    const bool unprotected = position >= n_sinks && position <= newest - n_recent;
    float score = 0.0f;
    for (int h = 0; h < HEADS; ++h) {
      const int head = choice * HEADS + h;
      float share = 0.0f;
      if (held && (MEMORY || unprotected)) {
        const size_t at = (size_t(head) * n_steps + step) * n_columns + c;
        share = metal::exp(float(logits[at]) - top[h]);
        if (WEIGHTED) {
          share *= tova_number(value_norms[size_t(head / GROUP) * n_columns + c]);
        }
      }
      if (MEMORY) {
        shares[(line * HEADS + h) * n_columns + c] = share;
      } else {
        score += share * factor[h];
      }
    }
    // Those that cannot be evicted are never the least.
    if (!MEMORY) {
      shares[line * n_columns + c] =
          held && unprotected ? tova_number(score) : INFINITY;
    }
  }
"""

SCAN_SOURCE = """
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
  threadgroup float top[HEADS];
  threadgroup float factor[HEADS];
  threadgroup float ratio[HEADS];
  threadgroup float least[SIMDGROUPS];
  threadgroup float best_score[SIMDGROUPS];
  threadgroup int best_column[SIMDGROUPS];

  // A thread keeps to its columns, so what it writes to device memory needs no barrier.
  for (int c = tid; c < n_columns; c += THREADS) {
    new_scores[own + c] = MEMORY ? scores[own + c] : 0.0f;
    last[own + c] = held_until[own + c];
  }
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
  for (int row = 0; row < n_rows; ++row) {
    const int step = first + row;
    const int n_seen = n_held + step + 1;
    const bool evicts = step >= first_evicting;
    const size_t line = size_t(choice) * n_rows + row;
    const int unprotected = range[line * 2];
    const int recent = range[line * 2 + 1];
#if TOVA_BEFORE
    const int nth = row - (n_rows - counts[5]);
    if (nth >= 0) {
      const size_t into = (size_t(choice) * counts[5] + nth) * n_columns;
      for (int c = tid; c < n_columns; c += THREADS) {
        before[into + c] = new_scores[own + c];
      }
    }
#endif

    // What the evicted leave of the sums.
    for (int h = simd; h < HEADS; h += SIMDGROUPS) {
      const int head = choice * HEADS + h;
      const size_t from = (size_t(head) * n_steps + step) * n_columns;
      float high = tops[line * HEADS + h];
      const float sum = sums[line * HEADS + h];
      float gone = 0.0f;
      for (int i = lane; i < n_victims; i += 32) {
        gone += metal::exp(float(logits[from + victims[i]]) - high);
      }
      float rest = sum - simd_sum(gone);
      const bool lost = tova_is_nan(rest) || rest < sum * LOST;
      if (lost) {
        high = -INFINITY;
        rest = 0.0f;
        for (int c = lane; c < n_seen; c += 32) {
          if (TOVA_HELD(c)) tova_add(high, rest, float(logits[from + c]));
        }
        if (SINKS && lane == 0) tova_add(high, rest, float(sinks[head % n_heads]));
        tova_join(high, rest);
      }
      if (lane == 0) {
        top[h] = high;
        // Where a head sees nothing its weights are NaN, and left out below.
        factor[h] = 1.0f / rest;
        ratio[h] = lost ? INFINITY : sum / rest;
      }
    }
    float mine = INFINITY;
    if (!MEMORY) {
      for (int c = tid; c < n_seen; c += THREADS) {
        if (TOVA_HELD(c)) mine = metal::min(mine, shares[line * n_columns + c]);
      }
      const float lowest_share = simd_min(mine);
      if (lane == 0) least[simd] = lowest_share;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float most = 0.0f;
    for (int h = lane; h < HEADS; h += 32) most = metal::max(most, ratio[h]);
    most = simd_max(most);
    const bool lost = most == INFINITY;
    // The scores after the last step are wanted of all.
    const bool all = MEMORY || lost || step == n_steps - 1;
    float bound = INFINITY;
    if (!all) {
      // With room for rounding, and for shares too small to have all of their digits.
      bound = simd_min(lane < SIMDGROUPS ? least[lane] : INFINITY);
      bound = bound * most * 1.0001f + 1e-37f;
    }

    float lowest = INFINITY;
    // A column whatever comes.
    int victim = n_columns - 1;
    for (int c = all || mine <= bound ? tid : n_seen; c < n_seen; c += THREADS) {
      if (!TOVA_HELD(c) || !(all || shares[line * n_columns + c] <= bound)) continue;
      float score = 0.0f;
      for (int h = 0; h < HEADS; ++h) {
        if (MEMORY && !lost) {
          score += shares[(line * HEADS + h) * n_columns + c] * factor[h];
          continue;
        }
        const int head = choice * HEADS + h;
        const size_t at = (size_t(head) * n_steps + step) * n_columns + c;
        float weight = metal::exp(float(logits[at]) - top[h]) * factor[h];
        if (WEIGHTED) {
          weight *= tova_number(value_norms[size_t(head / GROUP) * n_columns + c]);
        }
        score += weight;
      }
      score = tova_number(score * (1.0f / float(HEADS)));
      if (MEMORY) score += memory[0] * new_scores[own + c];
      if (all) new_scores[own + c] = score;
      if (c >= unprotected && c < recent) tova_take(lowest, victim, score, c);
    }
    if (evicts) {
      for (ushort apart = 16; apart > 0; apart >>= 1) {
        const float other_score = simd_shuffle_xor(lowest, apart);
        const int other_column = simd_shuffle_xor(victim, apart);
        tova_take(lowest, victim, other_score, other_column);
      }
      if (lane == 0) {
        best_score[simd] = lowest;
        best_column[simd] = victim;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int s = 0; s < SIMDGROUPS; ++s) {
        tova_take(lowest, victim, best_score[s], best_column[s]);
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
