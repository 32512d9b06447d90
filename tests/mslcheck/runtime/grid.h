// How a grid of threads falls into threadgroups, and where each thread stands.

#pragma once

#include <algorithm>

#include "interface.h"

namespace {

struct Size {
  uint32_t x, y, z;

  uint32_t count() const { return x * y * z; }
  Size at(uint32_t index) const {
    return {index % x, index / x % y, index / x / y};
  }
};

void set(uint32_t* attribute, Size size) {
  attribute[0] = size.x;
  attribute[1] = size.y;
  attribute[2] = size.z;
}

uint32_t groups_of(uint32_t size, uint32_t n) { return (n + size - 1) / size; }

struct Grid {
  Size threads;       // of the grid
  Size threadgroup;   // of a full threadgroup
  Size threadgroups;  // of the grid

  // The last threadgroup of a row may be smaller.
  Size size_of(Size position) const {
    auto left = [](uint32_t all, uint32_t each, uint32_t i) {
      return std::min(each, all - i * each);
    };
    return {left(threads.x, threadgroup.x, position.x),
            left(threads.y, threadgroup.y, position.y),
            left(threads.z, threadgroup.z, position.z)};
  }
};

Grid grid_of(const uint32_t* grid, const uint32_t* group) {
  Grid result;
  result.threads = {grid[0], grid[1], grid[2]};
  // MLX does the same before it dispatches.
  result.threadgroup = {std::min(group[0], grid[0]), std::min(group[1], grid[1]),
                        std::min(group[2], grid[2])};
  result.threadgroups = {groups_of(result.threadgroup.x, grid[0]),
                         groups_of(result.threadgroup.y, grid[1]),
                         groups_of(result.threadgroup.z, grid[2])};
  return result;
}

Attributes attributes_of(const Grid& grid, Size position, uint32_t index,
                         uint32_t width) {
  Size size = grid.size_of(position);
  Size inside = size.at(index);
  Attributes a = {};
  set(a.thread_position_in_grid, {position.x * grid.threadgroup.x + inside.x,
                                  position.y * grid.threadgroup.y + inside.y,
                                  position.z * grid.threadgroup.z + inside.z});
  set(a.thread_position_in_threadgroup, inside);
  set(a.threadgroup_position_in_grid, position);
  set(a.threads_per_threadgroup, size);
  set(a.dispatch_threads_per_threadgroup, grid.threadgroup);
  set(a.threadgroups_per_grid, grid.threadgroups);
  set(a.threads_per_grid, grid.threads);
  set(a.grid_size, grid.threads);
  a.thread_index_in_threadgroup = index;
  a.thread_index_in_simdgroup = index % width;
  a.simdgroup_index_in_threadgroup = index / width;
  a.simdgroups_per_threadgroup = groups_of(width, size.count());
  a.dispatch_simdgroups_per_threadgroup = groups_of(width, grid.threadgroup.count());
  a.threads_per_simdgroup = width;
  a.thread_execution_width = width;
  a.thread_index_in_quadgroup = index % 4;
  a.quadgroup_index_in_threadgroup = index / 4;
  a.quadgroups_per_threadgroup = groups_of(4, size.count());
  a.dispatch_quadgroups_per_threadgroup = groups_of(4, grid.threadgroup.count());
  return a;
}

}  // namespace
