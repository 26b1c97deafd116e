// The driver's functions by name, and devices entered by their primary contexts.
#include "driver.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <string>

#include "check.h"

namespace flashcore::cuda {
namespace {

void require(CUresult status, const char* doing) {
  if (status != CUDA_SUCCESS)
    throw CudaError(static_cast<int>(status), "the CUDA driver failed at " + std::string(doing) + " (code " +
                                                  std::to_string(static_cast<int>(status)) + ")");
}

struct Contexts {
  decltype(&cuDeviceGet) get_device = driver_function<decltype(get_device)>("cuDeviceGet", 12000);
  decltype(&cuDevicePrimaryCtxRetain) retain = driver_function<decltype(retain)>("cuDevicePrimaryCtxRetain", 12000);
  decltype(&cuCtxPushCurrent) push = driver_function<decltype(push)>("cuCtxPushCurrent", 12000);
  decltype(&cuCtxPopCurrent) pop = driver_function<decltype(pop)>("cuCtxPopCurrent", 12000);

  /// Kept for good, as the runtime does.
  CUcontext primary(int index) const {
    CUdevice device = 0;
    CUcontext context = nullptr;
    require(get_device(&device, index), "finding a device");
    require(retain(&context, device), "taking a device's primary context");
    return context;
  }
};

const Contexts& contexts() {
  static const Contexts functions;
  return functions;
}

CUcontext primary_context(int index) {
  static std::array<std::atomic<CUcontext>, 64> kept{};
  if (index < 0 || static_cast<std::size_t>(index) >= kept.size()) return contexts().primary(index);
  CUcontext context = kept[index].load(std::memory_order_acquire);
  if (!context) kept[index].store(context = contexts().primary(index), std::memory_order_release);
  return context;
}

}  // namespace

void* find_driver_function(const char* name, unsigned version) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &found),
        ("looking up " + std::string(name)).c_str());
  if (!entry) throw CudaError(cudaErrorNotSupported, "the CUDA driver has no " + std::string(name));
  return entry;
}

void DeviceGuard::enter(int index) {
  require(contexts().push(primary_context(index)), "entering a device");
  entered_ = true;
}

void DeviceGuard::leave() noexcept {
  CUcontext left = nullptr;
  contexts().pop(&left);
}

}  // namespace flashcore::cuda
