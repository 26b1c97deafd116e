// CUDA calls made safe: errors become exceptions, the current device is restored. C++17: kernel files include this.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "flashcore/error.h"

namespace flashcore::cuda {

/// Throws what `status` means; `doing` completes "CUDA failed at …". Out of memory becomes OutOfMemory, everything else
/// CudaError. The runtime's memory of the error is cleared, so that the caller's next own check does not find it.
inline void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  const std::string what = std::string("CUDA failed at ") + doing + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")";
  if (status == cudaErrorMemoryAllocation) throw OutOfMemory(what);
  throw CudaError(static_cast<int>(status), what);
}

/// Makes a device current for the length of a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    check(cudaGetDevice(&previous_), "reading the current device");
    if (previous_ == index) return;
    check(cudaSetDevice(index), "selecting a device");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace flashcore::cuda
