// Stopwatch: it tells the time of queued work, and recorded work can be done again.
#include "flashcore/stopwatch.h"

#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "flashcore/flashcore.h"

namespace flashcore {
namespace {

TEST(Stopwatch, TellsAtLeastTheTimeThatPassedOnTheCpu) {
  Stopwatch stopwatch(Device{});
  stopwatch.start();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_GE(stopwatch.stop(), 0.020);
}

TEST(Stopwatch, OnTheCpuRecordedWorkRunsWhenItIsReplayedAndNotBefore) {
  Stopwatch stopwatch(Device{});
  int runs = 0;
  const Recording recording = stopwatch.record([&] { ++runs; });
  EXPECT_EQ(runs, 0);
  recording.replay();
  recording.replay();
  EXPECT_EQ(runs, 2);
}

TEST(Stopwatch, RefusesADeviceThatDoesNotExist) {
  EXPECT_THROW(Stopwatch({DeviceType::cuda, device_count()}), Unsupported);
}

TEST(Memory, IsCopiedBetweenHostAndDevice) {
  for (const DeviceType type : {DeviceType::cpu, DeviceType::cuda}) {
    if (type == DeviceType::cuda && device_count() == 0) continue;
    const Device device{type, 0};
    const std::vector<float> source = {1, 2, 3, 4};
    std::vector<float> target(source.size());
    const std::size_t bytes = source.size() * sizeof(float);
    const Buffer first(bytes, device, nullptr), second(bytes, device, nullptr);
    copy_memory(first.data(), source.data(), bytes, device, nullptr);
    copy_memory(second.data(), first.data(), bytes, device, nullptr);
    copy_memory(target.data(), second.data(), bytes, device, nullptr);
    synchronize(device);
    EXPECT_EQ(target, source);
  }
}

/// One float on the GPU, and the work that doubles it.
class CudaStopwatch : public testing::Test {
 protected:
  void SetUp() override {
    if (device_count() == 0) GTEST_SKIP() << "no CUDA device";
    stopwatch_ = std::make_unique<Stopwatch>(device_);
    buffer_ = Buffer(sizeof(float), device_, stopwatch_->stream());
    const float one = 1;
    copy_memory(buffer_.data(), &one, sizeof(one), device_, stopwatch_->stream());
    synchronize(device_, stopwatch_->stream());
    view_ = TensorView::contiguous(buffer_.data(), DType::float32, device_, {1});
  }

  void TearDown() override {
    buffer_ = Buffer();
    empty_cache();  // before the stream goes that the memory was taken in order with
  }

  void double_it() { vector_add(view_, view_, view_, stopwatch_->stream()); }

  float value() {
    float result = 0;
    copy_memory(&result, buffer_.data(), sizeof(result), device_, stopwatch_->stream());
    synchronize(device_, stopwatch_->stream());
    return result;
  }

  Device device_{DeviceType::cuda, 0};
  std::unique_ptr<Stopwatch> stopwatch_;
  Buffer buffer_;
  TensorView view_;
};

TEST_F(CudaStopwatch, ReplaysARecordedGraph) {
  double_it();
  const Recording recording = stopwatch_->record([&] { double_it(); });
  EXPECT_EQ(value(), 2);  // recording is not running
  for (int i = 0; i < 3; ++i) recording.replay();
  EXPECT_EQ(value(), 16);
}

TEST_F(CudaStopwatch, TellsATimeOfQueuedWork) {
  double_it();
  stopwatch_->start();
  for (int i = 0; i < 100; ++i) double_it();
  const double seconds = stopwatch_->stop();
  EXPECT_GT(seconds, 0);
  EXPECT_LT(seconds, 10);
}

TEST_F(CudaStopwatch, IsUsableAfterARecordingThatFailed) {
  EXPECT_THROW(stopwatch_->record([] { throw std::runtime_error("no"); }), std::runtime_error);
  double_it();
  stopwatch_->record([&] { double_it(); }).replay();
  EXPECT_EQ(value(), 4);
}

}  // namespace
}  // namespace flashcore
