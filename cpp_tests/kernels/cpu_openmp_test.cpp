// OpenMP's threads: each task once, errors, nesting, limits, several callers, fork; absent where no runtime is loaded.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "flashcore/error.h"
#include "flashcore/threads.h"
#include "kernels/cpu/executor.h"

namespace flashcore::testing {
namespace {

/// Loads GCC's runtime as torch does: for everyone to see.
bool load_runtime() { return dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL) != nullptr; }

template <class Function>
Function* runtime_function(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

bool is_parallel() { return runtime_function<int()>("omp_in_parallel")() != 0; }
void limit_threads(int threads) { runtime_function<void(int)>("omp_set_num_threads")(threads); }

bool runs_each_once(std::int64_t tasks, int threads) {
  std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
  cpu::parallel_for(tasks, threads, [&](std::int64_t i) { ++runs[static_cast<std::size_t>(i)]; });
  for (const std::atomic<int>& count : runs)
    if (count != 1) return false;
  return true;
}

/// How many lanes run, each on a thread of its own, where so many are asked for.
int lanes_run(int asked) {
  std::atomic<int> lanes{0};
  openmp_executor()(asked, [](void* count) { ++*static_cast<std::atomic<int>*>(count); }, &lanes);
  return lanes;
}

/// Runs `body` on two threads of the runtime.
void run_region(void (*body)(void*), void* context) {
  using Region = void(void (*)(void*), void*, unsigned, unsigned);
  runtime_function<Region>("GOMP_parallel")(body, context, 2, 0);
}

class CpuOpenmp : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!load_runtime()) GTEST_SKIP() << "no libgomp.so.1 here";
    ASSERT_NE(openmp_executor(), nullptr);
    set_executor(openmp_executor());
    limit_threads(8);
  }
  void TearDown() override { set_executor(nullptr); }
};

TEST_F(CpuOpenmp, RunsEachTaskOnce) {
  for (const int threads : {1, 2, 3, 8})
    for (const std::int64_t tasks : {0, 1, 2, 7, 1000}) EXPECT_TRUE(runs_each_once(tasks, threads)) << tasks;
}

TEST_F(CpuOpenmp, RunsTasksInAParallelRegion) {
  std::atomic<int> outside{0};
  cpu::parallel_for(8, 2, [&](std::int64_t) { outside += !is_parallel(); });
  EXPECT_EQ(outside, 0);
}

TEST_F(CpuOpenmp, UsesTheThreadsAskedFor) {
  for (const int asked : {1, 2, 5}) EXPECT_EQ(lanes_run(asked), asked);
}

TEST_F(CpuOpenmp, UsesNoMoreThreadsThanTheRuntimeAllows) {
  limit_threads(2);
  EXPECT_EQ(lanes_run(5), 2);
  limit_threads(1);
  EXPECT_EQ(lanes_run(5), 1);
}

TEST_F(CpuOpenmp, ThrowsWhatATaskThrowsAndGoesOn) {
  const auto fails = [] {
    cpu::parallel_for(100, 3, [](std::int64_t i) {
      if (i == 40) throw std::runtime_error("task 40");
    });
  };
  EXPECT_THROW(fails(), std::runtime_error);
  EXPECT_TRUE(runs_each_once(100, 3));
}

TEST_F(CpuOpenmp, UsesOneThreadInAParallelRegion) {
  const auto allow_levels = runtime_function<void(int)>("omp_set_max_active_levels");
  allow_levels(2);  // by default the runtime itself does not nest
  std::atomic<int> lanes{0};
  run_region([](void* sum) { *static_cast<std::atomic<int>*>(sum) += lanes_run(3); }, &lanes);
  allow_levels(1);
  EXPECT_EQ(lanes, 2);
}

TEST_F(CpuOpenmp, RunsNestedWorkOnTheThreadThatAsks) {
  std::atomic<int> elsewhere{0};
  cpu::parallel_for(4, 2, [&](std::int64_t) {
    const std::thread::id here = std::this_thread::get_id();
    cpu::parallel_for(8, 2, [&](std::int64_t) { elsewhere += std::this_thread::get_id() != here; });
  });
  EXPECT_EQ(elsewhere, 0);
}

/// One team of threads, not one for each caller: who finds it busy works alone.
TEST_F(CpuOpenmp, ServesASecondCallerOnItsOwnThread) {
  std::atomic<bool> started{false}, done{false};
  std::thread first([&] {
    limit_threads(8);  // each thread has its own limit
    cpu::parallel_for(2, 2, [&](std::int64_t) {
      for (started = true; !done;) std::this_thread::yield();
    });
  });
  while (!started) std::this_thread::yield();
  EXPECT_EQ(lanes_run(3), 1);
  done = true;
  first.join();
  EXPECT_EQ(lanes_run(3), 3);
}

TEST_F(CpuOpenmp, ServesSeveralCallersAtATime) {
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
  for (int n = 0; n < 4; ++n)
    callers.emplace_back([&failures] {
      for (int round = 0; round < 100; ++round) failures += !runs_each_once(20, 3);
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(failures, 0);
}

/// The child has none of its parent's threads, and OpenMP would wait for them: flashcore's own do the work.
TEST_F(CpuOpenmp, WorksInAForkedChild) {
  ASSERT_EQ(lanes_run(3), 3);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    const bool right = runs_each_once(50, 3) && openmp_executor() && !is_parallel();
    _exit(right ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(lanes_run(3), 3);
}

/// A parent that used OpenMP without flashcore, a child that sees both for the first time.
[[noreturn]] void exit_from_a_child_of_openmp() {
  load_runtime();
  run_region([](void*) {}, nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    set_executor(openmp_executor());
    _exit(runs_each_once(50, 3) ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  std::_Exit(WIFEXITED(status) ? WEXITSTATUS(status) : 100 + WTERMSIG(status));
}

[[noreturn]] void exit_with_the_runtime_found() { std::_Exit(openmp_executor() ? 1 : 0); }

/// 1 where the tasks run in a parallel region of OpenMP, 0 where not, 200 for a refusal.
[[noreturn]] void exit_with_the_threads_of(const char* word) {
  load_runtime();
  word ? setenv("FLASHCORE_THREADS", word, 1) : unsetenv("FLASHCORE_THREADS");
  try {
    num_threads();
  } catch (const InvalidArgument&) {
    std::_Exit(200);
  }
  std::atomic<int> inside{0};
  cpu::parallel_for(8, 2, [&](std::int64_t) { inside += is_parallel(); });
  std::_Exit(inside > 0);
}

class CpuOpenmpDeathTest : public ::testing::Test {  // new processes: what is loaded and read, is so for good
 protected:
  void SetUp() override {
    ::testing::FLAGS_gtest_death_test_style = "threadsafe";
    if (!load_runtime()) GTEST_SKIP() << "no libgomp.so.1 here";
  }
};

TEST(CpuNoOpenmpDeathTest, HasNoExecutorWhereNoRuntimeIsLoaded) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(exit_with_the_runtime_found(), ::testing::ExitedWithCode(0), "");
}

TEST_F(CpuOpenmpDeathTest, WorksInAForkedChildThatMeetsTheRuntimeThere) {
  EXPECT_EXIT(exit_from_a_child_of_openmp(), ::testing::ExitedWithCode(0), "");
}

TEST_F(CpuOpenmpDeathTest, ReadsWhoseThreadsFromTheEnvironment) {
  setenv("OMP_NUM_THREADS", "2", 1);
  EXPECT_EXIT(exit_with_the_threads_of("openmp"), ::testing::ExitedWithCode(1), "");
  EXPECT_EXIT(exit_with_the_threads_of("pool"), ::testing::ExitedWithCode(0), "");
  EXPECT_EXIT(exit_with_the_threads_of(nullptr), ::testing::ExitedWithCode(0), "");
  EXPECT_EXIT(exit_with_the_threads_of("threads"), ::testing::ExitedWithCode(200), "");
  unsetenv("OMP_NUM_THREADS");
}

}  // namespace
}  // namespace flashcore::testing
