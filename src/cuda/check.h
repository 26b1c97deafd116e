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

/// Makes a device current for the length of a scope. Leaves the thread as it was, also if it had no device yet: to
/// select that one again with cudaSetDevice would make a context there, with hundreds of MiB of its memory.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    int current = 0;
    check(cudaGetDevice(&current), "reading the current device");
    if (current != index) enter(index);
  }
  ~DeviceGuard() {
    if (entered_) leave();
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void enter(int index);
  void leave() noexcept;

  bool entered_ = false;
};

}  // namespace flashcore::cuda
