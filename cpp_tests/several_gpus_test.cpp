// Several GPUs: calls on the second one while the first is the current one.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "flashcore/flashcore.h"
#include "support/public_call.h"
#include "support/test_device.h"

namespace flashcore::testing {
namespace {

constexpr Device kFirst = {DeviceType::cuda, 0};
constexpr Device kSecond = {DeviceType::cuda, 1};

class SecondGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (device_count() < 2) GTEST_SKIP() << "needs two CUDA devices, there are " << device_count();
  }
};

void run_while_the_first_is_current(const PublicCall& call, Stream stream = nullptr) {
  make_current(kFirst);
  call.run(stream);
  EXPECT_EQ(current_device(), kFirst);
}

void check_results(PublicCall& call) {
  call.tensors.download();
  call.tensors.check();
}

constexpr const char* kWithWorkspace = "bwd fp32 b2 q20 k33 h4/2 d16 causal_br";

TEST_F(SecondGpu, RunsTheCallsOfItsTensors) {
  for (const char* line : {"fwd fp16 b2 q100 k100 h2 d64 lse", "fwd bf16 b1 q2048 k2048 h1 d128 causal lse",
                           "fwd fp32 b2 q20 k33 h4/2 d16 causal_br lse",
                           "decode bf16 b3 q2 k32 h4/2 d16 page8 append2 causal lse", kWithWorkspace}) {
    SCOPED_TRACE(line);
    PublicCall call(line, kSecond);
    run_while_the_first_is_current(call);
    check_results(call);
  }
}

TEST_F(SecondGpu, HasAPoolOfItsOwnWhichGivesItsMemoryBack) {
  PublicCall call(kWithWorkspace, kSecond);
  ASSERT_GT(call.plan().workspace_bytes(), 0u);
  const auto allocations = [](Device device) { return memory_stats(device).allocations; };
  const auto before_first = allocations(kFirst), before_second = allocations(kSecond);
  run_while_the_first_is_current(call);
  EXPECT_EQ(allocations(kFirst), before_first);
  EXPECT_EQ(allocations(kSecond), before_second + 1);

  const std::size_t reserved = memory_stats(kSecond).bytes_reserved;
  make_current(kFirst);
  empty_cache();
  EXPECT_EQ(current_device(), kFirst);
  EXPECT_LT(memory_stats(kSecond).bytes_reserved, reserved);
  run_while_the_first_is_current(call);
  check_results(call);
}

/// A node that allocates would show that the pool had not seen the capture.
TEST_F(SecondGpu, RecordsCallsWithWorkspacesOnAnyOfItsStreams) {
  for (const StreamKind kind : {StreamKind::own, StreamKind::thread_default}) {
    SCOPED_TRACE(kind == StreamKind::own ? "own stream" : "default stream of the thread");
    PublicCall call(kWithWorkspace, kSecond);
    const TestStream stream(kSecond, kind);
    const TestGraph graph = stream.capture([&] { run_while_the_first_is_current(call, stream.get()); });
    EXPECT_EQ(graph.nodes().others, 0);
    stream.replay(graph);
    check_results(call);
  }
}

TEST_F(SecondGpu, TensorsOfTwoGpusAreRefusedByNameAndNothingIsWritten) {
  PublicCall call("fwd fp16 b2 q100 k100 h2 d64 lse", kSecond);
  const PublicCall other("fwd fp16 b2 q100 k100 h2 d64 lse", kFirst);
  const auto before = call.tensors.output_bytes();
  call.in.k = other.in.k;
  try {
    call.run();
    FAIL() << "k is on another GPU than q";
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(std::string(error.what()).find("k is on cuda:0, but q is on cuda:1"), 0u) << error.what();
  }
  call.tensors.download();
  EXPECT_EQ(call.tensors.output_bytes(), before);
}

}  // namespace
}  // namespace flashcore::testing
