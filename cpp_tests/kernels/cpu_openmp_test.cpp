// OpenMP's threads beyond what holds for each executor: limits, regions, fork; absent where no runtime is loaded.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "../support/executors.h"
#include "flashcore/error.h"
#include "flashcore/threads.h"
#include "kernels/cpu/executor.h"

namespace flashcore::testing {
namespace {

bool is_parallel() { return openmp_function<int()>("omp_in_parallel")() != 0; }

/// How many lanes run, each on a thread of its own, where so many are asked for.
int lanes_run(int asked) {
  std::atomic<int> lanes{0};
  openmp_executor()(asked, [](void* count) { ++*static_cast<std::atomic<int>*>(count); }, &lanes);
  return lanes;
}

/// Runs `body` on two threads of the runtime.
void run_region(void (*body)(void*), void* context) {
  using Region = void(void (*)(void*), void*, unsigned, unsigned);
  openmp_function<Region>("GOMP_parallel")(body, context, 2, 0);
}

class CpuOpenmp : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!load_openmp()) GTEST_SKIP() << "no libgomp.so.1 here";
    ASSERT_NE(openmp_executor(), nullptr);
    set_executor(openmp_executor());
    limit_openmp_threads(8);
  }
  void TearDown() override { set_executor(nullptr); }
};

TEST_F(CpuOpenmp, RunsTasksInAParallelRegion) {
  std::atomic<int> outside{0};
  cpu::parallel_for(8, 2, [&](std::int64_t) { outside += !is_parallel(); });
  EXPECT_EQ(outside, 0);
}

TEST_F(CpuOpenmp, UsesTheThreadsAskedFor) {
  for (const int asked : {1, 2, 5}) EXPECT_EQ(lanes_run(asked), asked);
}

TEST_F(CpuOpenmp, UsesNoMoreThreadsThanTheRuntimeAllows) {
  limit_openmp_threads(2);
  EXPECT_EQ(lanes_run(5), 2);
  limit_openmp_threads(1);
  EXPECT_EQ(lanes_run(5), 1);
}

TEST_F(CpuOpenmp, UsesOneThreadInAParallelRegion) {
  const auto allow_levels = openmp_function<void(int)>("omp_set_max_active_levels");
  allow_levels(2);  // by default the runtime itself does not nest
  std::atomic<int> lanes{0};
  run_region([](void* sum) { *static_cast<std::atomic<int>*>(sum) += lanes_run(3); }, &lanes);
  allow_levels(1);
  EXPECT_EQ(lanes, 2);
}

/// One team of threads, not one for each caller: who finds it busy works alone.
TEST_F(CpuOpenmp, ServesASecondCallerOnItsOwnThread) {
  std::atomic<bool> started{false}, done{false};
  std::thread first([&] {
    limit_openmp_threads(8);  // each thread has its own limit
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

/// The child has none of its parent's threads, and OpenMP would wait for them: flashcore's own do the work.
TEST_F(CpuOpenmp, WorksInAForkedChild) {
  ASSERT_EQ(lanes_run(3), 3);
  EXPECT_TRUE(holds_in_a_child([] { return runs_each_once(50, 3) && openmp_executor() && !is_parallel(); }));
  EXPECT_EQ(lanes_run(3), 3);
}

/// A parent that used OpenMP without flashcore, a child that sees both for the first time.
[[noreturn]] void exit_from_a_child_of_openmp() {
  load_openmp();
  run_region([](void*) {}, nullptr);
  std::_Exit(holds_in_a_child([] {
    set_executor(openmp_executor());
    return runs_each_once(50, 3);
  })
                 ? 0
                 : 1);
}

[[noreturn]] void exit_with_the_runtime_found() { std::_Exit(openmp_executor() ? 1 : 0); }

/// 1 where the tasks run in a parallel region of OpenMP, 0 where not, 200 for a refusal.
[[noreturn]] void exit_with_the_threads_of(const char* word) {
  load_openmp();
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
    if (!load_openmp()) GTEST_SKIP() << "no libgomp.so.1 here";
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
