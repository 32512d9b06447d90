// Fibers: a stack for every thread of a threadgroup and the switch between them.
// x86-64 System V only: what the callee must keep is on the stack, the rest is free.

#pragma once

#include <sys/mman.h>

#include <cstdint>

// Pushes the registers, stores the stack pointer in `save`, goes on where `load` was
// stored.
extern "C" void msl_switch(void** save, void* load);

asm(R"(
  .text
  .globl msl_switch
  .type msl_switch, @function
msl_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace {

// Not a power of two, or all stacks would share the same few lines of the CPU cache.
constexpr uint64_t STACK = (256 << 10) + 17 * 64;

// Kept between launches: pages that were touched once need no fault again.
char* stacks;
uint32_t n_stacks;

struct Fiber {
  void* pointer;
  char* stack;

  bool owns(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(stack) < STACK;
  }
};

bool reserve_stacks(uint32_t n) {
  if (n <= n_stacks) return true;
  if (stacks) munmap(stacks, STACK * n_stacks);
  void* mapped = mmap(nullptr, STACK * n, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return false;
  stacks = static_cast<char*>(mapped);
  n_stacks = n;
  return true;
}

// Lets the first switch to the fiber enter `function`, which must never return.
void prepare(Fiber& fiber, uint32_t index, void (*function)()) {
  fiber.stack = stacks + STACK * index;
  // A function is entered with its return address on a 16-byte boundary.
  void** top = reinterpret_cast<void**>(fiber.stack + STACK - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(function);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  fiber.pointer = top;
}

}  // namespace
