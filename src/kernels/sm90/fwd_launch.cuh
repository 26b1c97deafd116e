// From Params to a launch of the forward kernel: tensor maps, tile order, grid.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../../cuda/check.h"
#include "../../cuda/launch.cuh"
#include "../common/grouped_heads.h"
#include "../common/repair.h"
#include "../common/tensor_map.h"
#include "../kernel.h"
#include "fwd.cuh"
#include "positions.cuh"
#include "sm90.h"

namespace flashcore::sm90 {

/// Heads whose keys and values are walked together: as many as `section_mib` (half of the L2 cache) hold where tiles
/// differ in length (so that long ones can go first), else the heads of one group.
inline int section_heads(const detail::Params& p, int section_mib) {
  const std::int64_t section_bytes = std::int64_t{section_mib} << 20;
  const std::int64_t group = p.size.heads_q / p.size.heads_k;
  if (!tiles_differ(p.position)) return static_cast<int>(group);
  const std::int64_t bytes = 2 * p.size.seqlen_k * (p.size.head_dim + p.size.head_dim_v);
  const std::int64_t heads = std::max<std::int64_t>(1, section_bytes / std::max<std::int64_t>(1, bytes)) * group;
  return static_cast<int>(std::min(heads, p.size.batch * p.size.heads_q));
}

/// In which order tiles come, and how blocks get them. After `window` and `sequences`.
inline void order_tiles(const detail::Params& p, const FwdTile& shape, const tile::TileOrder& order, int blocks,
                        FwdArgs& args) {
  const bool differ = tiles_differ(p.position) || args.sequences;
  args.order = order;
  args.draws = differ && order.tiles > blocks && order.tiles <= tile::TileCounter::kMost;
  // The later the query, the longer its tile.
  args.octaves =
      shape.octaves_from > 0 && order.m_blocks >= shape.octaves_from && args.window.right >= 0 && args.window.left < 0;
  // In the last rounds no block holds tiles in store. Octaves leave the short ones for the end, but only those.
  constexpr int kLastRounds = 4;
  constexpr int kShortTile = 8;
  args.last_tiles = order.tiles - kLastRounds * blocks;
  args.short_tile = kShortTile;
  if (args.octaves) return;
  args.last_tiles = std::min(args.last_tiles, order.tiles - order.section_heads * order.m_blocks);
  args.short_tile = std::numeric_limits<int>::max();
}

/// Tiles of so many queries; packed: the most that sequences of this total can have.
inline std::int64_t count_tiles(const detail::Params& p, int block_m) {
  const detail::SizeParams& size = p.size;
  if (p.sequence.cu_seqlens_q) return size.heads_q * (size.total_q / block_m + size.batch);
  return (size.seqlen_q + block_m - 1) / block_m * size.batch * size.heads_q;
}

/// An estimate of the rows in full length that the busiest block goes through. Tiles that are drawn even out but for
/// half of one; rows behind the last are passed over there, and a causal row sees half of the keys on average.
template <class Traits>
double busiest_block(const detail::Params& p, int blocks) {
  constexpr int kRows = Traits::kBlockM;
  if constexpr (Traits::kEven) {
    const auto tiles = static_cast<double>(count_tiles(detail::with_heads_as_rows(p, kRows, blocks), kRows));
    return kRows * std::ceil(tiles / blocks);
  }
  const double seen = p.position.causal && p.position.window_left < 0 ? 0.5 : 1.0;
  return std::max<double>(kRows, seen * static_cast<double>(p.size.total_q * p.size.heads_q) / blocks) + 0.5 * kRows;
}

template <class Traits>
void launch_fwd(const detail::Plan& plan, const detail::Params& asked, void* workspace, Stream stream) {
  constexpr int kOutRows = 16;  // a warp's
  const detail::Params& p = Traits::kEven ? detail::with_heads_as_rows(asked, Traits::kBlockM, plan.blocks) : asked;
  const detail::SizeParams& size = p.size;
  const detail::SequenceParams& sequence = p.sequence;
  const bool packed = sequence.cu_seqlens_q != nullptr;
  const int m_blocks = static_cast<int>((size.seqlen_q + Traits::kBlockM - 1) / Traits::kBlockM);
  const int heads = static_cast<int>(size.batch * size.heads_q);
  const int tiles = static_cast<int>(count_tiles(p, Traits::kBlockM));
  if (m_blocks == 0 || tiles == 0) return;  // before the maps: they cannot be empty
  const std::int64_t batch = packed ? 1 : size.batch;
  const std::int64_t rows_q = packed ? size.total_q : size.seqlen_q;
  const std::int64_t rows_k = packed ? size.total_k : size.seqlen_k;
  const detail::TensorMap q =
      make_tensor_map(p.q, p.dtype, {size.head_dim, rows_q, size.heads_q, batch}, Traits::kBlockM);
  const detail::TensorMap k =
      make_tensor_map(p.k, p.dtype, {size.head_dim, rows_k, size.heads_k, batch}, Traits::kBlockN);
  const detail::TensorMap v =
      make_tensor_map(p.v, p.dtype, {size.head_dim_v, rows_k, size.heads_k, batch}, Traits::kBlockN);
  const detail::TensorMap out =
      make_tensor_map(p.out, p.dtype, {size.head_dim_v, rows_q, size.heads_q, batch}, kOutRows);

  FwdArgs args{};
  args.packed = packed;
  args.sequences = packed || sequence.seqused_k;
  args.window = key_window(p);
  order_tiles(p, Traits::kTile, {m_blocks, heads, section_heads(p, Traits::kTile.section_mib), tiles}, plan.blocks,
              args);
  args.seqlen_q = static_cast<int>(size.seqlen_q);
  args.heads_q = size.heads_q;
  args.group = size.heads_q / size.heads_k;
  args.q_batch_step = packed ? 0 : q.batch_step;
  args.q_head_step = q.head_step;
  args.k_batch_step = packed ? 0 : k.batch_step;
  args.k_head_step = k.head_step;
  args.v_batch_step = packed ? 0 : v.batch_step;
  args.v_head_step = v.head_step;
  args.scale_log2 = (Traits::kGeneral ? 1.0f : static_cast<float>(p.score.scale)) * tile::kLog2e;
  args.threshold = static_cast<float>(Traits::kTile.growth) / args.scale_log2;
  args.params = p;
  if (!Traits::kEven) {
    args.counter = {detail::slice<unsigned long long>(workspace, plan.slices[kTileCounter]), tile::new_tag()};
    args.any_spoilt = detail::slice<unsigned>(workspace, plan.slices[kAnySpoilt]);
    args.spoilt = detail::slice<std::uint8_t>(workspace, plan.slices[kSpoiltFlags]);
    args.flags_per_head = static_cast<int>(detail::spoilt_flags_per_head(packed, size));
  }

  constexpr int kSharedBytes = SharedPlan<Traits>::kBytes;
  const auto kernel = fwd<Traits>;
  static cuda::SharedMemory shared(kernel, kSharedBytes);
  shared.reserve_on(plan.device.index);
  const cuda::Grid grid{dim3(static_cast<unsigned>(std::min(plan.blocks, args.order.tiles))), Traits::kTile.threads(),
                        kSharedBytes};
  cuda::launch_early("launching sm90.fwd", kernel, grid, stream, q.map, k.map, v.map, out.map, args);
}

/// In tiles of the size that ends first, or of Plan::block_m queries.
template <class Element, int kHeadDim, FwdKind kKind>
void launch_fwd_sized(const detail::Plan& plan, const detail::Params& p, void* workspace, Stream stream) {
  using Large = FwdTraits<Element, kHeadDim, kKind>;
  if constexpr (has_small_tile(kHeadDim, kKind)) {
    using Small = FwdTraits<Element, kHeadDim, kKind, FwdSize::small>;
    const bool small = plan.block_m > 0 ? plan.block_m == Small::kBlockM
                                        : small_tile_cost(kHeadDim) * busiest_block<Small>(p, plan.blocks) <
                                              busiest_block<Large>(p, plan.blocks);
    if (small) return launch_fwd<Small>(plan, p, workspace, stream);
  }
  launch_fwd<Large>(plan, p, workspace, stream);
}

template <class Element, int kHeadDim>
void launch_fwd_kind(const detail::Plan& plan, const detail::Params& p, void* workspace, Stream stream) {
  if (p.score.softcap > 0 || p.alibi.data || p.bias.data || p.mask.data)
    return launch_fwd_sized<Element, kHeadDim, FwdKind::general>(plan, p, workspace, stream);
  if (tiles_differ(p.position) || p.sequence.cu_seqlens_q || p.sequence.seqused_k)
    return launch_fwd_sized<Element, kHeadDim, FwdKind::positional>(plan, p, workspace, stream);
  launch_fwd_sized<Element, kHeadDim, FwdKind::full>(plan, p, workspace, stream);
}

/// The kernels of a bucket.
template <int kHeadDim>
void launch_fwd_bucket(const detail::Plan& plan, const detail::Params& p, void* workspace, Stream stream) {
  const cuda::DeviceGuard guard(plan.device.index);
  if (p.dtype == DType::float16) return launch_fwd_kind<detail::Float16, kHeadDim>(plan, p, workspace, stream);
  launch_fwd_kind<detail::BFloat16, kHeadDim>(plan, p, workspace, stream);
}

}  // namespace flashcore::sm90
