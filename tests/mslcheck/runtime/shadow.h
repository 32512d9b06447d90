// What the checked build knows of every word of memory, and the rules it applies.
//
// Two accesses by different threads race unless both read, both are atomic, or a
// barrier that covers their space of memory lies between: one of the threadgroup, or
// one of the simdgroup that both are in. Nothing orders threadgroups of one launch.

#pragma once

#include <link.h>

#include "lanes.h"

namespace {

enum class Action { READ, WRITE, ATOMIC_LOAD, ATOMIC_STORE, ATOMIC_UPDATE };

enum Lanes : uint8_t { ONE = 0, SEVERAL_IN_SIMDGROUP = 1, SEVERAL = 2 };

bool is_atomic(Action action) {
  return action != Action::READ && action != Action::WRITE;
}

bool modifies(Action action) {
  return action != Action::READ && action != Action::ATOMIC_LOAD;
}

bool needs_value(Action action) {
  return action != Action::WRITE && action != Action::ATOMIC_STORE;
}

bool is_of_another_threadgroup(const Access& access) {
  return access.time < threadgroup_start;
}

// Whether an access of the current thread now would be unordered with this one.
bool is_unordered(const Access& access, Space space) {
  if (!access.time) return false;
  if (access.several_threadgroups) return true;
  if (is_of_another_threadgroup(access)) return space == DEVICE;
  if (access.time < barrier_at[space]) return false;
  if (access.lanes == SEVERAL) return true;
  if (lanes[access.lane].simdgroup == current->simdgroup) {
    if (access.time < simdgroups[current->simdgroup].barrier_at[space]) return false;
  }
  return access.lanes != ONE || access.lane != current->index;
}

// Adds the current thread to the accesses of its kind. Forgets those that are ordered
// before it for everyone who could still race with it.
void note(Access& access, Space space, Action action) {
  bool anew = access.time < std::max(threadgroup_start, barrier_at[space]);
  if (space == DEVICE && access.time && is_of_another_threadgroup(access)) {
    access.several_threadgroups = true;
  }
  if (anew) {
    access.lanes = ONE;
    access.modifies = access.several_threadgroups && access.modifies;
  } else if (access.lane != current->index && access.lanes != SEVERAL) {
    bool same = lanes[access.lane].simdgroup == current->simdgroup;
    bool passed = access.time < simdgroups[current->simdgroup].barrier_at[space];
    access.lanes = !same ? SEVERAL : passed ? ONE : SEVERAL_IN_SIMDGROUP;
  }
  access.time = now;
  access.lane = current->index;
  access.modifies |= modifies(action);
}

// What the action races with, or null.
const Access* race(const Cell& cell, Space space, Action action) {
  if (is_unordered(cell.write, space)) return &cell.write;
  if (modifies(action) && is_unordered(cell.read, space)) return &cell.read;
  bool matters = cell.atomic.modifies || modifies(action);
  if (!is_atomic(action) && matters && is_unordered(cell.atomic, space)) {
    return &cell.atomic;
  }
  return nullptr;
}

bool has_value(const Cell& cell, const Region& region) {
  if (region.is_filled) return true;
  return cell.set_at >= (region.space == THREADGROUP ? threadgroup_start : 1);
}

const char* name_of(Action action) {
  if (is_atomic(action)) return "atomic access";
  return action == Action::READ ? "read" : "write";
}

void report_race(const Region& region, uintptr_t address, Action action,
                 const Cell& cell, const Access& other, uintptr_t code) {
  const char* kind = &other == &cell.atomic  ? "an atomic access"
                     : &other == &cell.write ? "a write"
                                             : "a read";
  if (other.several_threadgroups || is_of_another_threadgroup(other)) {
    report("race", code, "%s of %s[%ld] races with %s in another threadgroup",
           name_of(action), region.name, region.element(address), kind);
  } else {
    report("race", code, "%s of %s[%ld] races with %s by thread %u", name_of(action),
           region.name, region.element(address), kind, other.lane);
  }
}

void check_cell(Region& region, uint64_t i, Action action, uintptr_t code) {
  Cell& cell = region.cells[i];
  uintptr_t address = region.base + i * region.cell_bytes;
  if (const Access* other = race(cell, region.space, action)) {
    report_race(region, address, action, cell, *other, code);
  }
  if (needs_value(action) && !has_value(cell, region)) {
    report("uninitialised read", code, "read of %s[%ld] before any write", region.name,
           region.element(address));
  }
  Access& kind = is_atomic(action)         ? cell.atomic
                 : action == Action::WRITE ? cell.write
                                           : cell.read;
  note(kind, region.space, action);
  if (modifies(action)) cell.set_at = now;
}

// From words to bytes, when something smaller is touched for the first time.
void split(Region& region) {
  std::vector<Cell> bytes;
  bytes.reserve(region.bytes);
  for (const Cell& cell : region.cells) bytes.insert(bytes.end(), 4, cell);
  region.cells.swap(bytes);
  region.cell_bytes = 1;
}

struct Range {
  uintptr_t begin, end;
};

// The kernel library's read-only segments: where `constant` tables are.
std::vector<Range> constants;

void find_constants() {
  constants.clear();
  auto visit = [](dl_phdr_info* info, size_t, void*) {
    std::vector<Range> found;
    bool ours = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
      const auto& segment = info->dlpi_phdr[i];
      if (segment.p_type != PT_LOAD || segment.p_flags & PF_W) continue;
      uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
      found.push_back({begin, begin + segment.p_memsz});
      auto kernel = reinterpret_cast<uintptr_t>(launch->kernel);
      ours |= kernel - begin < segment.p_memsz;
    }
    if (ours) constants = found;
    return ours ? 1 : 0;
  };
  dl_iterate_phdr(visit, nullptr);
}

bool is_constant(uintptr_t address) {
  return std::any_of(constants.begin(), constants.end(), [&](const Range& range) {
    return address >= range.begin && address < range.end;
  });
}

[[noreturn]] void stop_out_of_bounds(const Region* region, uintptr_t address,
                                     uint64_t n, Action action, uintptr_t code) {
  if (region) {
    report("out of bounds", code, "%lu-byte %s at %s[%ld], which has %lu elements", n,
           name_of(action), region->name, region->element(address),
           region->bytes / region->element_bytes);
  } else {
    report("out of bounds", code, "%lu-byte %s near no buffer", n, name_of(action));
  }
  stop();
}

void check(const volatile void* pointer, uint64_t n, Action action, uintptr_t code) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  if (current->fiber.owns(address)) return;
  Region* region = region_near(address);
  if (!region || !region->contains(address, n)) {
    if (action == Action::READ && is_constant(address)) return;
    stop_out_of_bounds(region, address, n, action, code);
  }
  if (needs_value(action)) {
    region->reads += std::max<uint64_t>(1, n / region->element_bytes);
  }
  if (!region->cell_bytes) {
    if (!modifies(action)) return;
    report("write to input", code, "write to %s[%ld]", region->name,
           region->element(address));
    stop();
  }
  if (region->cell_bytes == 4 && ((address | n) & 3)) split(*region);
  uint64_t first = (address - region->base) / region->cell_bytes;
  uint64_t count = n / region->cell_bytes;
  for (uint64_t i = 0; i < count; i++) check_cell(*region, first + i, action, code);
}

void report_unwritten(const Region& region) {
  if (!region.is_output || region.is_filled) return;
  uint64_t unwritten = 0;
  uint64_t first = 0;
  for (uint64_t i = 0; i < region.cells.size(); i++) {
    if (has_value(region.cells[i], region)) continue;
    if (!unwritten) first = i;
    unwritten++;
  }
  if (!unwritten) return;
  report("output not written", 0, "%s has %lu unwritten elements, first %s[%lu]",
         region.name, unwritten * region.cell_bytes / region.element_bytes, region.name,
         first * region.cell_bytes / region.element_bytes);
}

}  // namespace
