// The threads of one threadgroup: run as fibers, one at a time, until each waits at a
// barrier or for its simdgroup; then what they wait for happens and they go on.

#pragma once

#include <algorithm>
#include <vector>

#include "fibers.h"
#include "folds.h"
#include "grid.h"
#include "memory.h"

namespace {

enum class State : uint8_t { READY, AT_BARRIER, AT_SIMD_BARRIER, AT_EXCHANGE, DONE };

struct Lane {
  Fiber fiber;
  State state;
  uint16_t index;      // in the threadgroup
  uint16_t simdgroup;  // of the threadgroup
  uint16_t slot;       // in the simdgroup
  uintptr_t code;      // the call at which it waits
  uint32_t flags;      // of the barrier
  Type type;           // of the exchange
  Operation operation;
  alignas(16) unsigned char value[16];
  Attributes attributes;
};

struct Simdgroup {
  uint32_t first;
  uint32_t count;
  uint32_t barrier_at[2];  // by Space
  Values values;           // of the exchange that was last done
  alignas(16) unsigned char folded[16];
};

// Barriers are the clock: two accesses are ordered if one that covers both threads and
// the space was passed between them.
uint32_t now;
uint32_t threadgroup_start;
uint32_t barrier_at[2];  // by Space

std::vector<Lane> lanes;
std::vector<Simdgroup> simdgroups;
uint32_t threadgroup_index;
Lane* current;
void* scheduler;

std::string who() {
  if (!current) return "";
  return "thread " + std::to_string(current->index) + " of threadgroup " +
         std::to_string(threadgroup_index);
}

uint64_t random_state;

uint32_t random_below(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>((random_state >> 32) * n >> 32);
}

// Who comes first, second, ...; another order every time, as the seed says.
struct Order {
  std::vector<uint32_t> items;

  void reset(uint32_t n) {
    items.resize(n);
    for (uint32_t i = 0; i < n; i++) items[i] = i;
    if (launch->seed == 1) std::reverse(items.begin(), items.end());
  }
  const std::vector<uint32_t>& next() {
    if (launch->seed > 1) {
      for (uint32_t i = items.size(); i > 1; i--) {
        std::swap(items[i - 1], items[random_below(i)]);
      }
    }
    return items;
  }
};

Order simdgroup_order;
Order slot_order;

bool nan_wins() { return launch->seed & 1; }

void wait(State state, uintptr_t code) {
  current->state = state;
  current->code = code;
  msl_switch(&current->fiber.pointer, scheduler);
}

// Ends the launch from inside of a thread.
[[noreturn]] void stop() {
  stopped = true;
  wait(State::DONE, 0);
  __builtin_unreachable();
}

void lane_main() {
  launch->kernel(addresses, &current->attributes);
  wait(State::DONE, 0);
  __builtin_unreachable();
}

void resume(Lane& lane) {
  current = &lane;
  msl_switch(&scheduler, lane.fiber.pointer);
  current = nullptr;
}

void pass_barrier(uint32_t* times, uint32_t flags) {
  now++;
  if (flags & 1) times[DEVICE] = now;
  if (flags & 2) times[THREADGROUP] = now;
}

void report_at(Lane& lane, const char* kind, const char* what, Lane* other) {
  current = &lane;
  if (other) {
    report(kind, lane.code, "%s, others at <%lx>", what, code_offset(other->code));
  } else {
    report(kind, lane.code, "%s", what);
  }
  current = nullptr;
}

// The leader's operation, with the lanes of the simdgroup that wait at the same call.
void meet(Simdgroup& group, Lane& leader) {
  State state = leader.state;
  group.values.active = 0;
  for (uint32_t slot = 0; slot < group.count; slot++) {
    Lane& lane = lanes[group.first + slot];
    if (lane.state != state || lane.code != leader.code) continue;
    memcpy(group.values.bytes[slot], lane.value, sizeof lane.value);
    group.values.active |= 1ul << slot;
    lane.state = State::READY;
  }
  if (state == State::AT_SIMD_BARRIER) {
    pass_barrier(group.barrier_at, leader.flags);
  } else if (leader.operation != SHUFFLE) {
    fold_typed(group.folded, leader.type, leader.operation, group.values, MAX_WIDTH,
               nan_wins());
  }
}

// Until all its lanes are at a barrier of the threadgroup or done.
void run_simdgroup(Simdgroup& group) {
  const auto begin = lanes.begin() + group.first;
  const auto end = begin + group.count;
  for (;;) {
    for (uint32_t slot : slot_order.next()) {
      if (slot >= group.count || begin[slot].state != State::READY) continue;
      resume(begin[slot]);
      if (stopped) return;
    }
    auto leader = std::find_if(begin, end, [](const Lane& lane) {
      return lane.state == State::AT_SIMD_BARRIER || lane.state == State::AT_EXCHANGE;
    });
    if (leader == end) return;
    auto elsewhere = std::find_if(begin, end, [&](const Lane& lane) {
      return lane.state != State::DONE && lane.code != leader->code;
    });
    if (elsewhere != end) {
      const char* what = "a simdgroup operation in divergent control flow";
      report_at(*leader, "divergent simdgroup", what, &*elsewhere);
    }
    meet(group, *leader);
  }
}

void release_barrier() {
  Lane* first = nullptr;
  Lane* elsewhere = nullptr;
  bool some_left = false;
  for (Lane& lane : lanes) {
    if (lane.state == State::DONE) {
      some_left = true;
      continue;
    }
    if (!first) first = &lane;
    if (lane.code != first->code) elsewhere = &lane;
    lane.state = State::READY;
  }
  if (elsewhere) {
    report_at(*first, "divergent barrier", "threads wait at two barriers", elsewhere);
  } else if (some_left) {
    const char* what = "some threads ended without this barrier";
    report_at(*first, "divergent barrier", what, nullptr);
  }
  pass_barrier(barrier_at, first->flags);
}

void run_threadgroup() {
  auto is_done = [](const Lane& lane) { return lane.state == State::DONE; };
  for (;;) {
    for (uint32_t i : simdgroup_order.next()) {
      run_simdgroup(simdgroups[i]);
      if (stopped) return;
    }
    if (std::all_of(lanes.begin(), lanes.end(), is_done)) return;
    release_barrier();
  }
}

void set_up_threadgroup(const Grid& grid, uint32_t index) {
  Size position = grid.threadgroups.at(index);
  uint32_t width = launch->width;
  uint32_t count = grid.size_of(position).count();
  threadgroup_index = index;
  threadgroup_start = ++now;
  barrier_at[DEVICE] = barrier_at[THREADGROUP] = now;
  spoil_variables();
  lanes.resize(count);
  for (uint32_t i = 0; i < count; i++) {
    Lane& lane = lanes[i];
    lane.state = State::READY;
    lane.index = static_cast<uint16_t>(i);
    lane.simdgroup = static_cast<uint16_t>(i / width);
    lane.slot = static_cast<uint16_t>(i % width);
    lane.attributes = attributes_of(grid, position, i, width);
    prepare(lane.fiber, i, lane_main);
  }
  simdgroups.resize(groups_of(width, count));
  for (uint32_t i = 0; i < simdgroups.size(); i++) {
    Simdgroup& group = simdgroups[i];
    group.first = i * width;
    group.count = std::min(width, count - group.first);
    group.barrier_at[DEVICE] = group.barrier_at[THREADGROUP] = now;
  }
  simdgroup_order.reset(simdgroups.size());
  slot_order.reset(width);
}

}  // namespace
