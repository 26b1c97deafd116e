// The threads of the OpenMP runtime that the process has loaded already: beside torch, one set of threads and not two.
//
// Nothing of OpenMP is linked or loaded: the entry that compiled parallel regions call is looked up by its name, which
// GCC's runtime and LLVM's share.
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>

#include "executor.h"
#include "flashcore/threads.h"

namespace flashcore {
namespace cpu {
namespace {

struct Runtime {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags) = nullptr;
  int (*in_parallel)() = nullptr;
  int (*max_threads)() = nullptr;

  explicit operator bool() const { return parallel && in_parallel && max_threads; }
};

template <class Function>
void look_up(const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

Runtime loaded_runtime() {
  Runtime found;
  look_up("GOMP_parallel", found.parallel);
  look_up("omp_in_parallel", found.in_parallel);
  look_up("omp_get_max_threads", found.max_threads);
  return found;
}

/// Whether the process was forked and has not become another program since.
bool is_forked() {
  std::string line;
  std::getline(std::ifstream("/proc/self/stat"), line);
  std::istringstream fields(line.substr(line.rfind(')') + 1));  // after the program's name: state, five ids, flags
  std::string skipped;
  for (int i = 0; i < 6; ++i) fields >> skipped;
  unsigned long flags = 0;
  fields >> flags;
  return (flags & 0x40) != 0;  // PF_FORKNOEXEC
}

Runtime runtime;                      // written once, before anyone has `run_on_openmp`
std::atomic<bool> has_threads{true};  // not in a forked child: the runtime would wait for its parent's for ever
std::mutex turn;

/// As many lanes as the runtime allows, so that torch.set_num_threads holds here too. One job at a time: a caller that
/// finds the threads busy works alone.
void run_on_openmp(int lanes, void (*lane)(void*), void* context) {
  lanes = std::min(lanes, runtime.max_threads());
  if (lanes <= 1 || runtime.in_parallel()) return lane(context);
  if (!has_threads) return run_on_pool(lanes, lane, context);
  const std::unique_lock<std::mutex> mine(turn, std::try_to_lock);
  if (!mine.owns_lock()) return lane(context);
  runtime.parallel(lane, context, static_cast<unsigned>(lanes), 0);
}

}  // namespace
}  // namespace cpu

Executor openmp_executor() noexcept {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!cpu::runtime && (cpu::runtime = cpu::loaded_runtime())) {
    cpu::has_threads = !cpu::is_forked();
    pthread_atfork(nullptr, nullptr, [] { cpu::has_threads = false; });
  }
  return cpu::runtime ? cpu::run_on_openmp : nullptr;
}

}  // namespace flashcore
