// What the compiled kernel calls: the shim's functions, and in the checked build the
// hooks of -fsanitize=thread and -fsanitize=bounds, which are answered here and not by
// the sanitizers' own libraries.

#pragma once

#include "shadow.h"

#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace {

// Source of a shuffle: the first active lane.
constexpr uint32_t FIRST = ~0u;

void exchange(const void* value, uint32_t bytes, Type type, Operation operation,
              uintptr_t code) {
  memcpy(current->value, value, bytes);
  current->type = type;
  current->operation = operation;
  wait(State::AT_EXCHANGE, code);
}

uint32_t bytes_of(Type type) { return type == HALF ? 2 : 4; }

}  // namespace

extern "C" {

void __msl_barrier(uint32_t flags) {
  current->flags = flags;
  wait(State::AT_BARRIER, CALLER);
}

void __msl_simdgroup_barrier(uint32_t flags) {
  current->flags = flags;
  wait(State::AT_SIMD_BARRIER, CALLER);
}

float __msl_exp(float x) {
  launch->exponentials++;
  return __builtin_expf(x);
}

uint32_t __msl_lane() { return current->slot; }

uint32_t __msl_width() { return launch->width; }

// value <- that of the source lane.
void __msl_shuffle(void* value, uint32_t bytes, uint32_t source) {
  exchange(value, bytes, UINT, SHUFFLE, CALLER);
  const Values& values = simdgroups[current->simdgroup].values;
  if (source == FIRST) source = static_cast<uint32_t>(__builtin_ctzl(values.active));
  if (!values.has(source)) {
    report("inactive lane", CALLER, "a shuffle reads lane %u, which is inactive",
           source);
    return;
  }
  memcpy(value, values.bytes[source], bytes);
}

// value <- the operation over the simdgroup.
void __msl_fold(void* value, uint32_t type, uint32_t operation) {
  auto typed = static_cast<Type>(type);
  auto chosen = static_cast<Operation>(operation);
  exchange(value, bytes_of(typed), typed, chosen, CALLER);
  const Simdgroup& group = simdgroups[current->simdgroup];
  if (chosen == INCLUSIVE_SUM || chosen == EXCLUSIVE_SUM) {
    uint32_t end = current->slot + (chosen == INCLUSIVE_SUM);
    fold_typed(value, typed, chosen, group.values, end, false);
  } else {
    memcpy(value, group.folded, bytes_of(typed));
  }
}

uint32_t __msl_atomic_load(volatile uint32_t* word) {
  if (launch->checked) check(word, 4, Action::ATOMIC_LOAD, CALLER);
  return *word;
}

void __msl_atomic_store(volatile uint32_t* word, uint32_t value) {
  if (launch->checked) check(word, 4, Action::ATOMIC_STORE, CALLER);
  *word = value;
}

// Threads run one at a time, so reading and writing is atomic enough.
uint32_t __msl_atomic_exchange(volatile uint32_t* word, uint32_t value) {
  if (launch->checked) check(word, 4, Action::ATOMIC_UPDATE, CALLER);
  uint32_t old = *word;
  *word = value;
  return old;
}

uint32_t __msl_atomic_update(volatile uint32_t* word, uint32_t value, uint32_t type,
                             uint32_t operation) {
  if (launch->checked) check(word, 4, Action::ATOMIC_UPDATE, CALLER);
  uint32_t old = *word;
  auto chosen = static_cast<Operation>(operation);
  if (type == FLOAT) {
    float a, b;
    memcpy(&a, &old, 4);
    memcpy(&b, &value, 4);
    float result = combine(chosen, a, b, false);
    memcpy(&value, &result, 4);
  } else if (type == INT) {
    auto a = static_cast<int32_t>(old);
    auto b = static_cast<int32_t>(value);
    value = static_cast<uint32_t>(combine(chosen, a, b, false));
  } else {
    value = combine(chosen, old, value, false);
  }
  *word = value;
  return old;
}

// float to bfloat, to the nearest even; clang calls it by this name.
__bf16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  uint32_t rounded = is_nan ? bits | 0x400000 : bits + 0x7FFF + (bits >> 16 & 1);
  auto high = static_cast<uint16_t>(rounded >> 16);
  __bf16 result;
  memcpy(&result, &high, 2);
  return result;
}

#define MEMORY_HOOKS(N)                                                       \
  void __tsan_read##N(void* p) { check(p, N, Action::READ, CALLER); }         \
  void __tsan_write##N(void* p) { check(p, N, Action::WRITE, CALLER); }       \
  void __tsan_unaligned_read##N(void* p) { check(p, N, Action::READ, CALLER); } \
  void __tsan_unaligned_write##N(void* p) { check(p, N, Action::WRITE, CALLER); }

MEMORY_HOOKS(1)
MEMORY_HOOKS(2)
MEMORY_HOOKS(4)
MEMORY_HOOKS(8)
MEMORY_HOOKS(16)

void __tsan_init() {}

void* __tsan_memcpy(void* to, const void* from, size_t n) {
  check(from, n, Action::READ, CALLER);
  check(to, n, Action::WRITE, CALLER);
  return memcpy(to, from, n);
}

void* __tsan_memmove(void* to, const void* from, size_t n) {
  check(from, n, Action::READ, CALLER);
  check(to, n, Action::WRITE, CALLER);
  return memmove(to, from, n);
}

void* __tsan_memset(void* to, int value, size_t n) {
  check(to, n, Action::WRITE, CALLER);
  return memset(to, value, n);
}

// The parts of the sanitizer's record that we read; its own names differ.
struct ArrayType {
  uint16_t kind;
  uint16_t info;
  char name[1];  // "'float[4]'"
};

struct ArrayIndexing {
  const char* file;
  uint32_t line;
  uint32_t column;
  const ArrayType* array;
  const ArrayType* index;
};

// An index beyond an array of known size, private arrays included.
void __ubsan_handle_out_of_bounds(const ArrayIndexing* indexing, uintptr_t index) {
  report("out of bounds", CALLER, "index %ld of an array of type %s",
         static_cast<long>(index), indexing->array->name);
  stop();
}
}
