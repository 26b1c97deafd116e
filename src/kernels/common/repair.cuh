// Repair on the device: flagged rows done again, by warps that each look at a few flags at once.
#pragma once

#include <cstdint>

#include "../tile/exact_rows.cuh"
#include "repair.h"

namespace flashcore::detail {

inline constexpr int kFlagsPerWarp = 8;  // few, since a warp does its flags' rows one after the other

/// The last sequence whose flags begin at or before `flag`.
__device__ inline int batch_of_flag(const Params& p, std::int64_t flag) {
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
template <class T, int kMaxHeadDim>
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

/// The share of one of `warps` warps, by all its lanes.
template <class T, int kMaxHeadDim>
__device__ void redo_spoilt_rows(const Params& p, const std::uint8_t* spoilt, std::int64_t flags_per_head, int warp,
                                 int warps) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t flags = spoilt_flags(p.sequence.cu_seqlens_q != nullptr, p.size, flags_per_head);
  for (std::int64_t base = std::int64_t{warp} * kFlagsPerWarp; base < flags; base += warps * kFlagsPerWarp) {
    const bool looks = lane < kFlagsPerWarp && base + lane < flags;
    unsigned found = __ballot_sync(tile::kAllLanes, looks && spoilt[base + lane]);
    for (; found; found &= found - 1)
      redo_rows<T, kMaxHeadDim>(p, base + __ffs(static_cast<int>(found)) - 1, flags_per_head);
  }
}

}  // namespace flashcore::detail
