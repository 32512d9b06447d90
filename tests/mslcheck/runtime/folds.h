// What a simdgroup's lanes compute together: sums, minima, prefixes.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// The shim's metal_simdgroup has the same numbers.
enum Type : uint32_t { FLOAT = 0, HALF = 1, INT = 2, UINT = 3 };
enum Operation : uint32_t {
  SHUFFLE = 0,
  SUM = 1,
  PRODUCT = 2,
  MIN = 3,
  MAX = 4,
  AND = 5,
  OR = 6,
  XOR = 7,
  INCLUSIVE_SUM = 8,
  EXCLUSIVE_SUM = 9,
};

constexpr uint32_t MAX_WIDTH = 64;

struct Values {
  alignas(16) unsigned char bytes[MAX_WIDTH][16];
  uint64_t active;  // a bit for every lane that takes part

  bool has(uint32_t lane) const { return lane < MAX_WIDTH && (active >> lane & 1); }
};

// Metal says nothing of simd_min and simd_max on NaN, so `nan_wins` varies by launch.
template <typename T>
T extreme(T a, T b, bool b_is_better, bool nan_wins) {
  if (a != a) return nan_wins ? a : b;
  if (b != b) return nan_wins ? b : a;
  return b_is_better ? b : a;
}

template <typename T>
T combine(Operation operation, T a, T b, bool nan_wins) {
  if constexpr (std::is_integral_v<T>) {
    if (operation == AND) return a & b;
    if (operation == OR) return a | b;
    if (operation == XOR) return a ^ b;
  }
  if (operation == PRODUCT) return a * b;
  if (operation == MIN) return extreme(a, b, b < a, nan_wins);
  if (operation == MAX) return extreme(a, b, a < b, nan_wins);
  return a + b;
}

// Over the active lanes below `end`, in order of lane.
template <typename T>
void fold(void* result, Operation operation, const Values& values, uint32_t end,
          bool nan_wins) {
  bool first = true;
  T sum = 0;
  for (uint32_t lane = 0; lane < end; lane++) {
    if (!values.has(lane)) continue;
    T value;
    memcpy(&value, values.bytes[lane], sizeof value);
    sum = first ? value : combine(operation, sum, value, nan_wins);
    first = false;
  }
  memcpy(result, &sum, sizeof sum);
}

void fold_typed(void* result, Type type, Operation operation, const Values& values,
                uint32_t end, bool nan_wins) {
  switch (type) {
    case FLOAT:
      return fold<float>(result, operation, values, end, nan_wins);
    case HALF:
      return fold<_Float16>(result, operation, values, end, nan_wins);
    case INT:
      return fold<int32_t>(result, operation, values, end, nan_wins);
    case UINT:
      return fold<uint32_t>(result, operation, values, end, nan_wins);
  }
}

}  // namespace
