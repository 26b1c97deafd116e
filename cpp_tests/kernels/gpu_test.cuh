// What the tests of device code share: the GPU they need, how their kernels are started, and the swizzles.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "../support/test_device.h"
#include "cuda/check.h"

namespace flashcore::testing {

inline constexpr Device kGpu{DeviceType::cuda, 0};

/// Skips where there is no Hopper GPU.
class HopperTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (device_count() == 0 || device_info(kGpu).compute_major != 9)
      GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  }
};

/// Runs a kernel in one block, or as many as asked, and waits for it.
template <class... Formal, class... Actual>
void run_kernel(void (*kernel)(Formal...), int blocks, int threads, int shared_bytes, const Actual&... arguments) {
  cuda::check(cudaSetDevice(kGpu.index), "selecting the device");
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
              "reserving shared memory");
  kernel<<<blocks, threads, shared_bytes>>>(static_cast<Formal>(arguments)...);
  cuda::check(cudaGetLastError(), "launching a test kernel");
  cuda::check(cudaDeviceSynchronize(), "running a test kernel");
}

/// The test kernel's results, `count` of them; each begins as bytes 0xff.
template <class T>
class Results {
 public:
  explicit Results(std::size_t count)
      : array_(to_device(std::vector<unsigned char>(count * sizeof(T), std::uint8_t{0xff}), kGpu)) {}
  T* data() const { return static_cast<T*>(array_.data()); }
  std::vector<T> host() const { return to_host<T>(array_); }

 private:
  DeviceArray array_;
};

/// Where byte `offset` of a tile lies under a swizzle of `span` bytes (32, 64 or 128; 0: none): the 16-byte chunks of a
/// span are exchanged by the number of the 128-byte line (PTX manual, "Swizzling modes").
inline int swizzled(int offset, int span) { return span == 0 ? offset : offset ^ (offset >> 7 & (span / 16 - 1)) << 4; }

}  // namespace flashcore::testing
