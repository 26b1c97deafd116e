// Repair as a kernel of its own, for rows that cannot do it themselves.
#include "repair.cuh"

#include <algorithm>

#include "../../cuda/launch.cuh"

namespace flashcore::detail {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 4;  // untold, ptxas keeps to 80 registers for older chips and spills
constexpr int kFlagsPerBlock = kThreads / 32 * kFlagsPerWarp;
constexpr int kMaxHeadDim = 256;

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    repair(const __grid_constant__ Params p, const std::uint8_t* spoilt, std::int64_t flags_per_head) {
  cuda::wait_for_previous_kernel();  // it writes the flags
  constexpr int kWarps = kThreads / 32;
  redo_spoilt_rows<T, kMaxHeadDim>(p, spoilt, flags_per_head, static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32),
                                   static_cast<int>(gridDim.x) * kWarps);
}

}  // namespace

void repair_spoilt_rows(const Params& params, const std::uint8_t* spoilt, std::int64_t flags_per_head, Stream stream) {
  constexpr std::int64_t kMaxBlocks = 132 * 8;  // a grid's worth; further flags are looked at in strides
  const std::int64_t flags = spoilt_flags(false, params.size, flags_per_head);
  const std::int64_t blocks = std::min(cuda::blocks_for(flags, kFlagsPerBlock), kMaxBlocks);
  const auto kernel = params.dtype == DType::float16 ? repair<Float16> : repair<BFloat16>;
  cuda::launch_early("launching the repair of spoilt rows", kernel, blocks, kThreads, stream, params, spoilt,
                     flags_per_head);
}

}  // namespace flashcore::detail
