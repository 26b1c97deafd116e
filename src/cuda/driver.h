// driver: functions of the CUDA driver, which is reached through the runtime and never linked.
#pragma once

#include <cuda.h>

namespace flashcore::cuda {

/// The driver's function of this name as of a CUDA version (12000 is 12.0). Throws CudaError where it has none.
void* find_driver_function(const char* name, unsigned version);

/// The same with its type: driver_function<decltype(&cuCtxPopCurrent)>("cuCtxPopCurrent", 12000).
template <class Function>
Function driver_function(const char* name, unsigned version) {
  return reinterpret_cast<Function>(find_driver_function(name, version));
}

}  // namespace flashcore::cuda
