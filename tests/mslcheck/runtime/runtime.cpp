// Runs a Metal kernel that was compiled as C++ for OpenCL to x86-64, and checks it.
//
//   interface.h, attributes.h   what is shared with Python and with the kernel
//   report.h                    findings
//   memory.h                    buffers and threadgroup variables
//   grid.h                      threadgroups and positions
//   fibers.h, lanes.h           the threads of a threadgroup, barriers
//   folds.h                     sums and minima over a simdgroup
//   shadow.h                    races, bounds, reads of what was never written
//   hooks.h                     what the compiled kernel calls
//
// One launch at a time.

#include <setjmp.h>
#include <signal.h>
#include <sys/time.h>
#include <ucontext.h>

#include "hooks.h"

namespace {

sigjmp_buf before_kernel;

// A fault in the kernel, or too much time: back to msl_launch.
void leave(int signal, siginfo_t* info, void* context) {
  const auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  auto code = static_cast<uintptr_t>(registers[REG_RIP]) + 1;
  if (signal == SIGVTALRM) {
    report("timeout", 0, "no end after %u seconds of CPU time", launch->seconds);
  } else if (signal == SIGFPE) {
    report("crash", code, "an integer division by zero");
  } else {
    report("crash", code, "a fault at address %p", info->si_addr);
  }
  siglongjmp(before_kernel, 1);
}

void set_timer(uint32_t seconds) {
  itimerval timer = {};
  timer.it_value.tv_sec = seconds;
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};

// Signals run on a stack of their own: the kernel's may be what broke.
struct Signals {
  alignas(16) static inline char alternative[1 << 16];
  stack_t old_stack;
  struct sigaction old[std::size(SIGNALS)];

  Signals() {
    stack_t stack = {};
    stack.ss_sp = alternative;
    stack.ss_size = sizeof alternative;
    sigaltstack(&stack, &old_stack);
    struct sigaction action = {};
    action.sa_sigaction = leave;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (size_t i = 0; i < std::size(SIGNALS); i++) {
      sigaction(SIGNALS[i], &action, &old[i]);
    }
    set_timer(launch->seconds);
  }
  ~Signals() {
    set_timer(0);
    for (size_t i = 0; i < std::size(SIGNALS); i++) {
      sigaction(SIGNALS[i], &old[i], nullptr);
    }
    sigaltstack(&old_stack, nullptr);
  }
};

// Flushes denormals to zero while it lives, if the launch says so. All threads of a
// kernel are fibers of this one, and a switch between them leaves the register as it is.
struct Flushing {
  static constexpr unsigned FLUSH_RESULTS = 1 << 15, FLUSH_ARGUMENTS = 1 << 6;
  unsigned old = __builtin_ia32_stmxcsr();

  Flushing() {
    if (launch->flush) __builtin_ia32_ldmxcsr(old | FLUSH_RESULTS | FLUSH_ARGUMENTS);
  }
  // After a fault, too: the signal's handler came back with a register of its own.
  ~Flushing() { __builtin_ia32_ldmxcsr(old); }
};

Order threadgroup_order;

void run_grid(const Grid& grid) {
  threadgroup_order.reset(grid.threadgroups.count());
  for (uint32_t index : threadgroup_order.next()) {
    set_up_threadgroup(grid, index);
    run_threadgroup();
    if (stopped) return;
  }
}

void start(Launch* what) {
  launch = what;
  launch->n_findings = 0;
  launch->exponentials = 0;
  reported.clear();
  stopped = false;
  current = nullptr;
  now = 1;
  random_state = 0x9E3779B97F4A7C15 * (launch->seed + 1);
  find_constants();
}

}  // namespace

extern "C" void msl_launch(Launch* what) {
  start(what);
  Grid grid = grid_of(launch->grid, launch->threadgroup);
  if (!reserve_stacks(grid.threadgroup.count()) || !place_buffers()) {
    report("crash", 0, "cannot reserve address space for the launch");
  } else {
    place_variables();
    Signals signals;
    Flushing flushing;
    if (sigsetjmp(before_kernel, 1) == 0) {
      run_grid(grid);
    } else {
      stopped = true;
    }
    current = nullptr;
  }
  if (launch->checked && !stopped) {
    for (const Region& region : regions) report_unwritten(region);
  }
  take_outputs_back();
  free_memory();
}
