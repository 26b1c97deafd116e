// launch: how every kernel is started.
#pragma once

#include <cuda_runtime.h>

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

/// `count` things, `each` per block.
inline std::int64_t blocks_for(std::int64_t count, std::int64_t each) { return (count + each - 1) / each; }

}  // namespace flashcore::cuda
