// What Python and the runtime hand to each other. run.py has the same structs for
// ctypes, field by field.

#pragma once

#include <cstdint>

#include "attributes.h"

// A buffer argument. The runtime works on a copy and writes outputs back.
struct Buffer {
  const char* name;
  void* data;
  uint64_t bytes;
  uint32_t element_bytes;
  uint32_t is_output;
  uint32_t is_filled;  // an output that starts with an init_value
  uint64_t reads;      // of elements, written by the runtime if it checks
};

// A threadgroup variable, from the table that build.py adds to the kernel's assembly.
struct Variable {
  char* address;  // null: the end of the table
  uint64_t bytes;
  const char* name;
};

struct Finding {
  char kind[24];  // a value of Kind in findings.py
  uint64_t code;  // offset into the kernel's library, 0 if nowhere in particular
  char message[232];
};

struct Launch {
  void (*kernel)(const uint64_t* buffers, const Attributes* attributes);
  const Variable* variables;
  Buffer* buffers;
  Finding* findings;
  uint32_t n_buffers;
  uint32_t max_findings;
  uint32_t n_findings;  // written by the runtime
  uint32_t grid[3];
  uint32_t threadgroup[3];
  uint32_t width;  // threads of a simdgroup, at most 64
  uint32_t seed;   // 0: lanes run in order, 1: backwards, others: shuffled
  uint32_t seconds;  // of CPU time, then the launch ends with a finding
  uint32_t checked;  // whether the kernel calls the hooks of hooks.h
  uint32_t flush;    // whether denormal floats are 0, as arguments and as results
  uint64_t exponentials;  // written by the runtime: calls of exp
};
