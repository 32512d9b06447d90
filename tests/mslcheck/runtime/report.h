// Findings: where they are collected, each place once.

#pragma once

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <set>
#include <string>
#include <utility>

#include "interface.h"

namespace {

Launch* launch;
// Set by what a kernel cannot go on after, such as a write out of bounds.
bool stopped;
std::set<std::pair<uintptr_t, std::string>> reported;

// Written by lanes.h: "thread 3 of threadgroup 1", empty between threads.
std::string who();

// The offset of a return address in the kernel's library, as addr2line wants it; 0 if
// it is not there. The call is before the address, which may be on the next line.
uintptr_t code_offset(uintptr_t address) {
  Dl_info kernel;
  Dl_info here;
  dladdr(reinterpret_cast<void*>(launch->kernel), &kernel);
  if (!dladdr(reinterpret_cast<void*>(address), &here)) return 0;
  if (here.dli_fbase != kernel.dli_fbase) return 0;
  return address - reinterpret_cast<uintptr_t>(kernel.dli_fbase) - 1;
}

// `code` is a return address in the kernel or 0. In messages, <%lx> around a
// `code_offset` becomes a line of the source.
__attribute__((format(printf, 3, 4))) void report(const char* kind, uintptr_t code,
                                                  const char* format, ...) {
  if (!reported.insert({code, kind}).second) return;
  if (launch->n_findings == launch->max_findings) return;
  Finding& finding = launch->findings[launch->n_findings++];
  snprintf(finding.kind, sizeof finding.kind, "%s", kind);
  finding.code = code_offset(code);
  char text[160];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::string thread = who();
  snprintf(finding.message, sizeof finding.message, "%s%s%s", text,
           thread.empty() ? "" : ", ", thread.c_str());
}

}  // namespace
