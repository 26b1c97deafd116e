// The CPU's threads: a small pool that spins, then sleeps; the settings of how many and whose; scratch memory of one.
//
// The caller works too and takes tasks until none is left. It then closes the job and waits only for workers that are
// inside it: one that has not woken up yet finds the job closed and goes back to sleep. So an oversubscribed machine
// is never slower than one thread, and a forked child, which has no workers, still finishes its calls.
#include "executor.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include "flashcore/error.h"
#include "flashcore/memory.h"
#include "flashcore/threads.h"

namespace flashcore {
namespace cpu {
namespace {

/// Looks at the flag this often before it sleeps: some 20 µs, about the cost of a wake-up.
constexpr int kSpins = 4000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  /// One job at a time: a caller that finds the pool busy works alone.
  void run(int lanes, void (*lane)(void*), void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return lane(context);
    grow(lanes - 1);
    lane_ = lane;
    context_ = context;
    places_ = lanes - 1;
    open_ = true;
    ++job_;
    if (sleepers_ > 0) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
    lane(context);
    open_ = false;
    while (inside_ > 0) pause();
  }

 private:
  void grow(int workers) {
    try {
      for (; workers_ < workers; ++workers_) std::thread([this, seen = job_.load()] { work(seen); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: those that are there do the work.
    }
  }

  [[noreturn]] void work(std::uint64_t seen) {
    for (;;) {
      wait_for_job(seen);
      seen = job_;
      ++inside_;  // before `open_` is read: the caller closes first and then waits for who is inside
      if (open_ && places_.fetch_sub(1) > 0) lane_(context_);
      --inside_;
    }
  }

  void wait_for_job(std::uint64_t seen) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (job_ != seen) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, [&] { return job_ != seen; });
    --sleepers_;
  }

  std::mutex turn_;
  int workers_ = 0;                // guarded by turn_
  void (*lane_)(void*) = nullptr;  // this and context_ are written while the job is closed and nobody is inside
  void* context_ = nullptr;
  alignas(64) std::atomic<std::uint64_t> job_{0};
  alignas(64) std::atomic<bool> open_{false};
  std::atomic<int> places_{0};
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// The pool is never destroyed: its threads may outlive every static object.
std::atomic<Pool*> the_pool{nullptr};

}  // namespace

void run_on_pool(int lanes, void (*lane)(void*), void* context) {
  static const bool ready = [] {
    the_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });  // a child has none of its parent's threads
    return true;
  }();
  static_cast<void>(ready);
  the_pool.load()->run(lanes, lane, context);
}

namespace {

std::atomic<Executor> executor_setting{nullptr};  // null: not read yet
std::atomic<int> thread_setting{0};               // 0: not read yet
thread_local bool is_inside_job = false;

/// A job's tasks, and the first exception of any.
struct Job {
  void (*task)(void*, std::int64_t);
  void* context;
  std::int64_t tasks;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;

  void take_tasks() noexcept {
    const bool was_inside = std::exchange(is_inside_job, true);
    try {
      for (std::int64_t i; !failed && (i = next.fetch_add(1)) < tasks;) task(context, i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
    is_inside_job = was_inside;
  }
};

int allowed_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

int initial_threads() {
  if (const char* text = std::getenv("FLASHCORE_NUM_THREADS")) {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (end == text || *end != 0 || value < 1 || value > 4096)
      throw InvalidArgument("FLASHCORE_NUM_THREADS is \"" + std::string(text) +
                            "\"; it must be a number from 1 to 4096");
    return static_cast<int>(value);
  }
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {  // a list holds one number a nesting level
    const long value = std::strtol(text, nullptr, 10);
    if (value >= 1 && value <= 4096) return static_cast<int>(value);
  }
  return allowed_processors();
}

Executor initial_executor() {
  const char* text = std::getenv("FLASHCORE_THREADS");
  const std::string_view word = text ? text : "pool";
  if (word == "pool") return run_on_pool;
  if (word != "openmp")
    throw InvalidArgument("FLASHCORE_THREADS is \"" + std::string(word) + "\"; it must be \"pool\" or \"openmp\"");
  const Executor openmp = openmp_executor();
  return openmp ? openmp : run_on_pool;
}

Executor executor() {
  Executor setting = executor_setting;
  if (!setting) {
    const Executor initial = initial_executor();
    if (executor_setting.compare_exchange_strong(setting, initial)) return initial;
  }
  return setting;
}

struct Scratch {
  ~Scratch() { give_back(); }
  void give_back() {
    if (data) system_resource(Device{}).deallocate(data, bytes, nullptr);
    data = nullptr;
    bytes = 0;
  }

  void* data = nullptr;
  std::size_t bytes = 0;
};

}  // namespace

void run_tasks(std::int64_t tasks, int threads, void (*task)(void*, std::int64_t), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || is_inside_job) {
    for (std::int64_t i = 0; i < tasks; ++i) task(context, i);
    return;
  }
  Job job{.task = task, .context = context, .tasks = tasks};
  executor()(threads, [](void* j) { static_cast<Job*>(j)->take_tasks(); }, &job);
  if (job.error) std::rethrow_exception(job.error);
}

void* thread_scratch(std::size_t bytes) {
  thread_local Scratch scratch;
  if (scratch.bytes < bytes) {
    scratch.give_back();
    scratch.data = system_resource(Device{}).allocate(bytes, nullptr);
    scratch.bytes = bytes;
  }
  return scratch.data;
}

}  // namespace cpu

int num_threads() {
  cpu::executor();  // every call comes by here before it writes anything: both settings are refused here
  int threads = cpu::thread_setting;
  if (threads == 0) {
    const int initial = cpu::initial_threads();
    if (cpu::thread_setting.compare_exchange_strong(threads, initial)) return initial;
  }
  return threads;
}

void set_num_threads(int threads) {
  if (threads < 1) throw InvalidArgument(std::to_string(threads) + " threads given; at least 1 is needed");
  cpu::thread_setting = threads;
}

void set_executor(Executor executor) noexcept { cpu::executor_setting = executor ? executor : cpu::run_on_pool; }

}  // namespace flashcore
