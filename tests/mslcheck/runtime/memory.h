// The kernel's memory: one region per buffer and per threadgroup variable.
//
// Buffers lie in an arena of reserved address space, one in the middle of each 32 GiB
// slot, so that no 32-bit index times an element can lead from one into another. What
// is around a buffer is not mapped: the unchecked build faults there.

#pragma once

#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "report.h"

namespace {

enum Space { DEVICE = 0, THREADGROUP = 1 };

// One kind of access to a cell, as far as it can still race with another.
struct Access {
  uint32_t time = 0;  // 0: none
  uint16_t lane = 0;
  uint8_t lanes = 0;  // ONE, SEVERAL_IN_SIMDGROUP or SEVERAL
  bool several_threadgroups = false;
  bool modifies = false;
};

// The shadow of one word or byte, see shadow.h.
struct Cell {
  uint32_t set_at = 0;  // the time of the last write of any kind, 0: none
  Access write;
  Access read;
  Access atomic;
};

struct Region {
  const char* name;
  uintptr_t base;
  uint64_t bytes;
  uint32_t element_bytes;
  Space space;
  bool is_output = false;
  bool is_filled = false;
  uint32_t cell_bytes = 0;  // 4, or 1 once something smaller was touched; 0: input
  uint64_t reads = 0;       // of elements
  std::vector<Cell> cells;

  bool contains(uintptr_t address, uint64_t n) const {
    return address >= base && address - base + n <= bytes;
  }
  long element(uintptr_t address) const {
    return static_cast<long>(address - base) / static_cast<long>(element_bytes);
  }
};

constexpr int SLOT_BITS = 35;
constexpr uint64_t SLOT = 1ul << SLOT_BITS;
constexpr uint64_t PAGE = 4096;
constexpr uint32_t MAX_BUFFERS = 64;
// build.py leaves as much free after every threadgroup variable.
constexpr uint64_t GUARD = 1 << 16;

char* arena;
uint64_t arena_bytes;
std::vector<Region> regions;  // buffers, then threadgroup variables
uint32_t n_buffers;
uint64_t addresses[MAX_BUFFERS];

// Outputs and threadgroup variables have a shadow; inputs never change.
void add_cells(Region& region) {
  if (!launch->checked) return;
  region.cell_bytes = region.bytes % 4 || region.element_bytes % 4 ? 1 : 4;
  region.cells.assign(region.bytes / region.cell_bytes, Cell{});
}

// Returns whether the address space could be had.
bool place_buffers() {
  n_buffers = launch->n_buffers;
  arena_bytes = SLOT * n_buffers;
  void* reserved = mmap(nullptr, arena_bytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return false;
  arena = static_cast<char*>(reserved);
  for (uint32_t i = 0; i < n_buffers; i++) {
    const Buffer& buffer = launch->buffers[i];
    char* base = arena + SLOT * i + SLOT / 2;
    uint64_t pages = (buffer.bytes + PAGE - 1) / PAGE * PAGE;
    if (mprotect(base, pages, PROT_READ | PROT_WRITE)) return false;
    memcpy(base, buffer.data, buffer.bytes);
    if (!buffer.is_output) mprotect(base, pages, PROT_READ);
    addresses[i] = reinterpret_cast<uintptr_t>(base);
    Region region;
    region.name = buffer.name;
    region.base = addresses[i];
    region.bytes = buffer.bytes;
    region.element_bytes = buffer.element_bytes;
    region.space = DEVICE;
    region.is_output = buffer.is_output;
    region.is_filled = buffer.is_filled;
    if (region.is_output) add_cells(region);
    regions.push_back(std::move(region));
  }
  return true;
}

void place_variables() {
  for (const Variable* variable = launch->variables; variable->address; variable++) {
    Region region;
    region.name = variable->name;
    region.base = reinterpret_cast<uintptr_t>(variable->address);
    region.bytes = variable->bytes;
    region.element_bytes = variable->bytes % 4 ? 1 : 4;
    region.space = THREADGROUP;
    add_cells(region);
    regions.push_back(std::move(region));
  }
}

// Threadgroup memory starts with whatever was there; NaN shows best.
void spoil_variables() {
  for (uint32_t i = n_buffers; i < regions.size(); i++) {
    memset(reinterpret_cast<void*>(regions[i].base), 0xFF, regions[i].bytes);
  }
}

// The region that an address is in, or is meant to be in: of a buffer its slot, of a
// variable what follows it.
Region* region_near(uintptr_t address) {
  uint64_t offset = address - reinterpret_cast<uintptr_t>(arena);
  if (offset < arena_bytes) return &regions[offset >> SLOT_BITS];
  for (uint32_t i = n_buffers; i < regions.size(); i++) {
    if (address - regions[i].base < regions[i].bytes + GUARD) return &regions[i];
  }
  return nullptr;
}

void take_outputs_back() {
  for (uint32_t i = 0; i < n_buffers; i++) {
    Buffer& buffer = launch->buffers[i];
    buffer.reads = regions[i].reads;
    if (buffer.is_output) {
      memcpy(buffer.data, reinterpret_cast<void*>(addresses[i]), buffer.bytes);
    }
  }
}

void free_memory() {
  if (arena) munmap(arena, arena_bytes);
  arena = nullptr;
  regions.clear();
}

}  // namespace
