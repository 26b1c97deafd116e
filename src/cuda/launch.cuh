// launch: how kernels are started.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "check.h"
#include "flashcore/tensor.h"

namespace flashcore::cuda {

/// The largest x dimension of a grid. Kernels walk their work in strides of the grid, so any amount fits.
inline constexpr std::int64_t kMaxBlocks = 0x7fffffff;

/// Queues `kernel` over `blocks` blocks of `threads` threads; no blocks, no launch. The status is that of this launch:
/// unlike cudaGetLastError it cannot be an older error of somebody else.
template <class... Formal, class... Actual>
void launch(const char* name, void (*kernel)(Formal...), std::int64_t blocks, int threads, Stream stream,
            const Actual&... arguments) {
  if (blocks <= 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Formal>(arguments)...), name);
}

/// Whether the current device starts a kernel early, while the one before it on the stream ends.
inline bool can_start_early() {
  int device = 0;
  int major = 0;
  check(cudaGetDevice(&device), "reading the current device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "reading the compute capability");
  return major >= 9;
}

/// Lets a kernel have `bytes` of dynamic shared memory, which CUDA wants to be told once for each device.
template <class... Formal>
class SharedMemory {
 public:
  constexpr SharedMemory(void (*kernel)(Formal...), int bytes) : kernel_(kernel), bytes_(bytes) {}

  /// On the device of this number, which is the current one.
  void reserve_on(int device) {
    const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;  // of more devices: told each time
    if (reserved_.load(std::memory_order_acquire) & bit) return;
    check(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes_),
          "reserving shared memory");
    reserved_.fetch_or(bit, std::memory_order_release);
  }

 private:
  void (*kernel_)(Formal...);
  int bytes_;
  std::atomic<std::uint64_t> reserved_{0};  // a bit for each device
};

struct Grid {
  dim3 blocks;
  int threads;  // of a block
  std::size_t shared_bytes = 0;
};

/// For devices that can start a kernel early, while the one before it on the stream ends: the kernel must begin with
/// wait_for_previous_kernel(), save for what reads and writes no global memory. Queueing it is also cheaper for the
/// host (0.5 of 3.7 us).
template <class... Formal, class... Actual>
void launch_early(const char* name, void (*kernel)(Formal...), const Grid& grid, Stream stream,
                  const Actual&... arguments) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<const Formal&>(arguments)...), name);
}

/// The same as launch, for such a kernel; on older devices it starts as any other.
template <class... Formal, class... Actual>
void launch_early(const char* name, void (*kernel)(Formal...), std::int64_t blocks, int threads, Stream stream,
                  const Actual&... arguments) {
  if (blocks <= 0) return;
  if (!can_start_early()) return launch(name, kernel, blocks, threads, stream, arguments...);
  const Grid grid{dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)), threads};
  launch_early(name, kernel, grid, stream, static_cast<Formal>(arguments)...);
}

/// Until the kernel before this one on the stream is done and what it wrote can be read.
inline __device__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// The next kernel on the stream may start once every block has come here or ended, if it was started early; what this
/// one writes it sees after its wait_for_previous_kernel().
inline __device__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// `count` things, `each` per block.
inline std::int64_t blocks_for(std::int64_t count, std::int64_t each) { return (count + each - 1) / each; }

}  // namespace flashcore::cuda
