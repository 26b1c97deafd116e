// The CUDA devices of this process: how many, why none, and their properties.
#include <cuda_runtime_api.h>

#include "check.h"
#include "runtime.h"

namespace flashcore::cuda {
namespace {

struct Found {
  int count = 0;
  std::string reason;
};

Found find_devices() noexcept {
  Found found;
  const cudaError_t status = cudaGetDeviceCount(&found.count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    found.count = 0;
    found.reason = cudaGetErrorString(status);
  } else if (found.count == 0) {
    found.reason = "no CUDA-capable device is detected";
  }
  return found;
}

/// Asked once: the runtime itself never changes its answer in a running process.
const Found& found_devices() {
  static const Found found = find_devices();
  return found;
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "reading a device attribute");
  return value;
}

}  // namespace

int device_count() { return found_devices().count; }

std::string no_device_reason() { return found_devices().reason; }

DeviceInfo device_info(int index) {
  cudaDeviceProp properties = {};
  check(cudaGetDeviceProperties(&properties, index), "reading device properties");
  DeviceInfo info;
  info.device = {DeviceType::cuda, index};
  info.name = properties.name;
  info.compute_major = properties.major;
  info.compute_minor = properties.minor;
  info.warp_size = properties.warpSize;
  info.multiprocessors = properties.multiProcessorCount;
  info.memory_bytes = properties.totalGlobalMem;
  info.l2_bytes = static_cast<std::size_t>(properties.l2CacheSize);
  info.shared_bytes_per_block = properties.sharedMemPerBlockOptin;
  info.shared_bytes_per_sm = properties.sharedMemPerMultiprocessor;
  info.clock_khz = attribute(cudaDevAttrClockRate, index);
  info.memory_clock_khz = attribute(cudaDevAttrMemoryClockRate, index);
  info.memory_bus_bits = attribute(cudaDevAttrGlobalMemoryBusWidth, index);
  check(cudaDriverGetVersion(&info.driver_version), "reading the driver's version");
  check(cudaRuntimeGetVersion(&info.runtime_version), "reading the runtime's version");
  return info;
}

}  // namespace flashcore::cuda
