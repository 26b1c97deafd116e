// The CPU's threads: each task once, errors, nesting, several callers, fork, settings, a caller's own threads.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <vector>

#include "../support/executors.h"
#include "flashcore/error.h"
#include "flashcore/threads.h"
#include "kernels/cpu/executor.h"

namespace flashcore::testing {
namespace {

/// flashcore's own threads, and those of OpenMP: what holds for both.
class EachExecutor : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (GetParam() == std::string_view("pool")) return;
    if (!load_openmp()) GTEST_SKIP() << "no libgomp.so.1 here";
    ASSERT_NE(openmp_executor(), nullptr);
    set_executor(openmp_executor());
    limit_openmp_threads(8);
  }
  void TearDown() override { set_executor(nullptr); }
};

INSTANTIATE_TEST_SUITE_P(CpuExecutor, EachExecutor, ::testing::Values("pool"), [](const auto&) { return "pool"; });
INSTANTIATE_TEST_SUITE_P(CpuOpenmp, EachExecutor, ::testing::Values("openmp"), [](const auto&) { return "openmp"; });

TEST_P(EachExecutor, RunsEachTaskOnce) {
  for (const int threads : {1, 2, 3, 8})
    for (const std::int64_t tasks : {0, 1, 2, 7, 1000}) EXPECT_TRUE(runs_each_once(tasks, threads)) << tasks;
}

TEST(CpuExecutor, RunsManyJobsInARow) {
  for (int n = 0; n < 3000; ++n) ASSERT_TRUE(runs_each_once(4, 1 + n % 4)) << n;
}

TEST_P(EachExecutor, ThrowsWhatATaskThrowsAndGoesOn) {
  const auto fails = [] {
    cpu::parallel_for(100, 3, [](std::int64_t i) {
      if (i == 40) throw std::runtime_error("task 40");
    });
  };
  EXPECT_THROW(fails(), std::runtime_error);
  EXPECT_TRUE(runs_each_once(100, 3));
}

TEST_P(EachExecutor, RunsNestedWorkOnTheThreadThatAsks) {
  std::atomic<int> elsewhere{0};
  cpu::parallel_for(4, 2, [&](std::int64_t) {
    const std::thread::id here = std::this_thread::get_id();
    cpu::parallel_for(8, 2, [&](std::int64_t) { elsewhere += std::this_thread::get_id() != here; });
  });
  EXPECT_EQ(elsewhere, 0);
}

TEST_P(EachExecutor, ServesSeveralCallersAtATime) {
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
  for (int n = 0; n < 4; ++n)
    callers.emplace_back([&failures] {
      for (int round = 0; round < 300; ++round) failures += !runs_each_once(20, 3);
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(failures, 0);
}

// The child has none of its parent's threads: it must neither wait for them nor fail.
TEST_P(EachExecutor, WorksInAForkedChild) {
  ASSERT_TRUE(runs_each_once(50, 3));
  EXPECT_TRUE(holds_in_a_child([] { return runs_each_once(50, 3); }));
  EXPECT_TRUE(runs_each_once(50, 3));
}

std::atomic<int> lanes_asked{0};

TEST(CpuExecutor, UsesTheCallersThreadsIfGiven) {
  set_executor([](int lanes, void (*lane)(void*), void* context) {
    lanes_asked = lanes;
    std::thread other(lane, context);
    lane(context);
    other.join();
  });
  EXPECT_TRUE(runs_each_once(100, 2));
  set_executor(nullptr);
  EXPECT_EQ(lanes_asked, 2);
  lanes_asked = 0;
  EXPECT_TRUE(runs_each_once(100, 2));
  EXPECT_EQ(lanes_asked, 0);
}

TEST(CpuExecutor, TakesTheNumberOfThreadsThatIsSet) {
  const int before = num_threads();
  EXPECT_GE(before, 1);
  set_num_threads(7);
  EXPECT_EQ(num_threads(), 7);
  EXPECT_THROW(set_num_threads(0), InvalidArgument);
  EXPECT_EQ(num_threads(), 7);
  set_num_threads(before);
}

/// The number of threads that a fresh process finds with these variables.
[[noreturn]] void exit_with_threads(const char* own, const char* openmp) {
  own ? setenv("FLASHCORE_NUM_THREADS", own, 1) : unsetenv("FLASHCORE_NUM_THREADS");
  openmp ? setenv("OMP_NUM_THREADS", openmp, 1) : unsetenv("OMP_NUM_THREADS");
  try {
    std::_Exit(num_threads());
  } catch (const InvalidArgument&) {
    std::_Exit(200);
  }
}

TEST(CpuExecutorDeathTest, ReadsTheNumberOfThreadsFromTheEnvironment) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";  // a new process: the variables are read once
  EXPECT_EXIT(exit_with_threads("3", "5"), ::testing::ExitedWithCode(3), "");
  EXPECT_EXIT(exit_with_threads(nullptr, "5,2"), ::testing::ExitedWithCode(5), "");
  EXPECT_EXIT(exit_with_threads("many", "5"), ::testing::ExitedWithCode(200), "");
  EXPECT_EXIT(exit_with_threads("0", nullptr), ::testing::ExitedWithCode(200), "");
}

}  // namespace
}  // namespace flashcore::testing
