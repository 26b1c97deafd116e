// What the tests of the CPU's threads share, whoever owns these.
#pragma once

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/cpu/executor.h"

namespace flashcore::testing {

/// Whether every one of `tasks` tasks runs exactly once.
inline bool runs_each_once(std::int64_t tasks, int threads) {
  std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
  cpu::parallel_for(tasks, threads, [&](std::int64_t i) { ++runs[static_cast<std::size_t>(i)]; });
  for (const std::atomic<int>& count : runs)
    if (count != 1) return false;
  return true;
}

/// Loads GCC's OpenMP runtime as torch does: for everyone to see.
inline bool load_openmp() { return dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL) != nullptr; }

template <class Function>
Function* openmp_function(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

/// For the regions that this thread opens.
inline void limit_openmp_threads(int threads) { openmp_function<void(int)>("omp_set_num_threads")(threads); }

/// Whether `check` holds in a forked child, within 20 seconds.
inline bool holds_in_a_child(bool (*check)()) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(check() ? 0 : 1);
  }
  int status = 1;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace flashcore::testing
