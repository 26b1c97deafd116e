// Repair: a warp looks at a few flags at once; where one is set, it does its rows one after the other.
#include <algorithm>

#include "../../cuda/launch.cuh"
#include "../tile/exact_rows.cuh"
#include "repair.h"

namespace flashcore::detail {
namespace {

constexpr int kThreads = 128;
constexpr int kFlagsPerWarp = 8;  // few, since a warp does its flags' rows one after the other
constexpr int kFlagsPerBlock = kThreads / 32 * kFlagsPerWarp;
constexpr int kMaxHeadDim = 256;

/// The last sequence whose flags begin at or before `flag`.
__device__ int batch_of_flag(const Params& p, std::int64_t flag) {
  int low = 0;
  int high = static_cast<int>(p.size.batch);
  while (low + 1 < high) {
    const int middle = (low + high) / 2;
    const std::int64_t begin = clamped(p.sequence.cu_seqlens_q[middle], 0, p.size.total_q);
    (begin / kSpoiltRows + middle <= flag ? low : high) = middle;
  }
  return low;
}

/// A warp does the rows of one flag.
template <class T>
__device__ void redo_rows(const Params& p, std::int64_t flag, std::int64_t flags_per_head) {
  const bool packed = p.sequence.cu_seqlens_q != nullptr;
  const std::int64_t plane = flag / flags_per_head;  // head, or head of a batch entry
  std::int64_t group = flag - plane * flags_per_head;
  const int batch = packed ? batch_of_flag(p, group) : static_cast<int>(plane / p.size.heads_q);
  const int head = static_cast<int>(packed ? plane : plane - std::int64_t{batch} * p.size.heads_q);
  const Sequence s = sequence_of(p, batch);
  if (packed) group -= s.q_begin / kSpoiltRows + batch;
  const std::int64_t first = group * kSpoiltRows;
  for (std::int64_t row = first; row < clamped(first + kSpoiltRows, 0, s.seqlen_q); ++row)
    tile::exact_row<T, kMaxHeadDim>(p, batch, head, static_cast<int>(row));
}

/// Of all heads: out and lse of packed rows that belong to no sequence.
template <class T>
__device__ void clear_unowned_row(const Params& p, std::int64_t row) {
  if (batch_of_row(p, row) >= 0) return;
  const Sequence none{};
  for (int head = 0; head < p.size.heads_q; ++head) {
    T* out = static_cast<T*>(p.out.data) + q_offset(p.out, none, head, row);
    for (int d = 0; d < p.size.head_dim_v; ++d) store(out[d], 0.0f);
    if (p.lse.data) static_cast<float*>(p.lse.data)[row_offset(p.lse, none, head, row)] = -INFINITY;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) repair(const __grid_constant__ Params p, const std::uint8_t* spoilt,
                                                   std::int64_t flags_per_head, std::int64_t flags) {
  cuda::wait_for_previous_kernel();  // it writes the flags
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t thread = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t base = thread / 32 * kFlagsPerWarp; base < flags; base += threads / 32 * kFlagsPerWarp) {
    const bool looks = lane < kFlagsPerWarp && base + lane < flags;
    unsigned found = __ballot_sync(tile::kAllLanes, looks && spoilt[base + lane]);
    for (; found; found &= found - 1) redo_rows<T>(p, base + __ffs(static_cast<int>(found)) - 1, flags_per_head);
  }
  if (p.sequence.cu_seqlens_q)
    for (std::int64_t row = thread; row < p.size.total_q; row += threads) clear_unowned_row<T>(p, row);
}

}  // namespace

void repair_spoilt_rows(const Params& params, const std::uint8_t* spoilt, std::int64_t flags_per_head, Stream stream) {
  constexpr std::int64_t kMaxBlocks = 132 * 8;  // a grid's worth; further flags are looked at in strides
  const bool packed = params.sequence.cu_seqlens_q != nullptr;
  const std::int64_t flags = spoilt_flags(packed, params.size, flags_per_head);
  const std::int64_t blocks = std::min(cuda::blocks_for(flags, kFlagsPerBlock), kMaxBlocks);
  const auto kernel = params.dtype == DType::float16 ? repair<Float16> : repair<BFloat16>;
  cuda::launch_early("launching the repair of spoilt rows", kernel, blocks, kThreads, stream, params, spoilt,
                     flags_per_head, flags);
}

}  // namespace flashcore::detail
