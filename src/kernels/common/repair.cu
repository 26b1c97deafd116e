// Repair: one warp looks at one flag.
#include <algorithm>

#include "../../cuda/launch.cuh"
#include "../tile/exact_rows.cuh"
#include "repair.h"

namespace flashcore::detail {
namespace {

constexpr int kGroupRows = 16;
constexpr int kThreads = 128;
constexpr int kMaxHeadDim = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    repair(const __grid_constant__ Params p, const std::uint8_t* spoilt, std::int64_t groups) {
  cuda::wait_for_previous_kernel();  // it writes the flags
  const std::int64_t warps = std::int64_t(gridDim.x) * (kThreads / 32);
  const std::int64_t all = groups * p.size.batch * p.size.heads_q;
  for (std::int64_t w = std::int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; w < all; w += warps) {
    if (!spoilt[w]) continue;
    const std::int64_t head = w / groups;
    const int batch = static_cast<int>(head / p.size.heads_q);
    const std::int64_t first = (w - head * groups) * kGroupRows;
    const std::int64_t last = clamped(first + kGroupRows, 0, p.size.seqlen_q);
    for (std::int64_t row = first; row < last; ++row)
      tile::exact_row<T, kMaxHeadDim>(p, batch, static_cast<int>(head) - batch * p.size.heads_q, static_cast<int>(row));
  }
}

}  // namespace

void repair_spoilt_rows(const Params& params, const std::uint8_t* spoilt, std::int64_t groups, Stream stream) {
  constexpr std::int64_t kMaxBlocks = 132 * 8;  // a grid's worth; further groups are looked at in strides
  const std::int64_t all = groups * params.size.batch * params.size.heads_q;
  const std::int64_t blocks = std::min(cuda::blocks_for(all * 32, kThreads), kMaxBlocks);
  const auto kernel = params.dtype == DType::float16 ? repair<Float16> : repair<BFloat16>;
  cuda::launch_early("launching the repair of spoilt rows", kernel, blocks, kThreads, stream, params, spoilt, groups);
}

}  // namespace flashcore::detail
