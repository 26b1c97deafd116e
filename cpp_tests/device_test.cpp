// Devices: how many there are, what they are, and what is said of one that does not exist.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "flashcore/flashcore.h"

namespace flashcore {
namespace {

std::string refusal_of(Device device) {
  try {
    device_info(device);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(DeviceInfo, TheCpuIsAlwaysThere) {
  const DeviceInfo& info = device_info({DeviceType::cpu, 0});
  EXPECT_EQ(info.device, (Device{DeviceType::cpu, 0}));
  EXPECT_FALSE(info.name.empty());
  EXPECT_GE(info.multiprocessors, 1);
  EXPECT_GT(info.memory_bytes, 0u);
  EXPECT_EQ(info.compute_major, 0);
}

TEST(DeviceInfo, IsReadOnceAndStays) {
  EXPECT_EQ(&device_info({DeviceType::cpu, 0}), &device_info({DeviceType::cpu, 0}));
}

TEST(DeviceInfo, OrdinalsThatDoNotExistAreRefused) {
  const std::string count = std::to_string(device_count());
  for (const int index : {-1, device_count(), 1000}) {
    const std::string message = refusal_of({DeviceType::cuda, index});
    EXPECT_NE(message.find(std::to_string(index)), std::string::npos) << message;
    EXPECT_NE(message.find(count + " CUDA device"), std::string::npos) << message;
  }
  EXPECT_NE(refusal_of({DeviceType::cpu, 1}).find("1 CPU device"), std::string::npos);
}

TEST(DeviceInfo, TheRefusalSaysWhyThereIsNoDevice) {
  if (device_count() > 0) GTEST_SKIP() << "there is a CUDA device";
  EXPECT_NE(refusal_of({DeviceType::cuda, 0}).find(no_device_reason()), std::string::npos);
}

TEST(DeviceInfo, DescribesCudaDevices) {
  if (device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const DeviceInfo& info = device_info();
  EXPECT_EQ(info.device, (Device{DeviceType::cuda, 0}));
  EXPECT_FALSE(info.name.empty());
  EXPECT_GE(info.compute_major, 5);
  EXPECT_GE(info.multiprocessors, 1);
  EXPECT_GT(info.memory_bytes, std::size_t{1} << 28);
  EXPECT_GT(info.l2_bytes, 0u);
  EXPECT_GE(info.shared_bytes_per_block, std::size_t{48} << 10);
  EXPECT_GE(info.shared_bytes_per_sm, info.shared_bytes_per_block);
  EXPECT_GE(info.driver_version, 11000);
  EXPECT_GE(info.runtime_version, 11000);
}

TEST(DeviceCount, AReasonIsGivenExactlyWhereThereIsNoDevice) {
  EXPECT_GE(device_count(), 0);
  EXPECT_EQ(no_device_reason().empty(), device_count() > 0);
}

TEST(DeviceCount, WithoutCudaThereIsNone) {
  if (built_with_cuda()) GTEST_SKIP() << "built with CUDA";
  EXPECT_EQ(device_count(), 0);
  EXPECT_EQ(no_device_reason(), "built without CUDA");
}

TEST(Synchronize, WaitsOnDevicesThatExistOnly) {
  EXPECT_NO_THROW(synchronize({DeviceType::cpu, 0}));
  for (int index = 0; index < device_count(); ++index) EXPECT_NO_THROW(synchronize({DeviceType::cuda, index}));
  EXPECT_THROW(synchronize({DeviceType::cuda, device_count()}), Unsupported);
}

TEST(Version, HasThreeNumbers) {
  int major = 0;
  int minor = 0;
  int patch = 0;
  char rest = 0;
  EXPECT_EQ(std::sscanf(version(), "%d.%d.%d%c", &major, &minor, &patch, &rest), 3) << version();
}

}  // namespace
}  // namespace flashcore
