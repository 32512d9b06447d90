"""Metal that kernels share: the lowest score, and who has it."""

# One flag a column in threadgroup memory, 8.25 KiB.
MAX_COLUMNS = 67_584

# 16 simdgroups: enough to hide the loads of the one threadgroup that a layer has, and
# far from the 1,024 that a kernel with more registers cannot be given.
THREADS = 512
SIMDGROUPS = THREADS // 32

HEADER = """
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

# The lowest of all threads of a threadgroup, in every thread; -1: none may be evicted.
LOWEST = """
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
"""

BEST = """
  threadgroup float best_score[SIMDGROUPS];
  threadgroup int best_position[SIMDGROUPS];
  threadgroup int best_column[SIMDGROUPS];
"""
