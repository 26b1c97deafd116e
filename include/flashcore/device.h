// The devices that this process can use.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "flashcore/tensor.h"

namespace flashcore {

/// What flashcore knows of a device. Read once and cached; the values do not change while the process runs.
struct DeviceInfo {
  Device device;
  std::string name;       ///< as the driver (or /proc/cpuinfo) spells it
  int compute_major = 0;  ///< CUDA compute capability; 0 on the CPU
  int compute_minor = 0;
  int warp_size = 0;             ///< threads that run in step; 0 on the CPU
  int multiprocessors = 0;       ///< SMs; on the CPU the number of hardware threads
  std::size_t memory_bytes = 0;  ///< total memory of the device
  std::size_t l2_bytes = 0;
  std::size_t shared_bytes_per_block = 0;  ///< largest dynamic shared memory that a block can opt in to
  std::size_t shared_bytes_per_sm = 0;
  int clock_khz = 0;  ///< highest SM clock
  int memory_clock_khz = 0;
  int memory_bus_bits = 0;
  int driver_version = 0;  ///< as CUDA counts it: 13000 is 13.0
  int runtime_version = 0;
};

/// Number of usable CUDA devices: 0 where there is no GPU, no driver, or where this build has no CUDA rows.
FLASHCORE_API int device_count() noexcept;

/// Why `device_count()` is 0 ("built without CUDA", the driver's own words, …); empty where it is not.
FLASHCORE_API std::string no_device_reason();

/// Properties of a device. Throws InvalidArgument for an ordinal that does not exist.
FLASHCORE_API const DeviceInfo& device_info(Device device = {DeviceType::cuda, 0});

/// Waits until the work queued on `stream` so far is done. Does nothing on the CPU. No other function waits.
FLASHCORE_API void synchronize(Device device, Stream stream = nullptr);

/// True if this build holds CUDA kernels.
FLASHCORE_API bool built_with_cuda() noexcept;

/// Version of the library, "0.1.0".
FLASHCORE_API const char* version() noexcept;

}  // namespace flashcore
