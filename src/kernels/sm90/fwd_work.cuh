// What a block of the Hopper forward works on: its tiles, the keys they look at, and the warp that finds them and hands
// them on.
#pragma once

#include <cstdint>

#include "../common/repair.h"
#include "../params.h"
#include "../ptx/barrier.cuh"
#include "../semantics.h"
#include "../tile/mask.cuh"
#include "../tile/scheduler.cuh"
#include "../tile/softmax.cuh"
#include "tiles.h"

namespace flashcore::sm90 {

inline constexpr int kPanelColumns = 64;  // a 128-byte swizzle row of 16-bit elements
inline constexpr int kPanelRowBytes = 128;
inline constexpr int kWarpgroup = 128;
inline constexpr int kRowsPerConsumer = 64;
inline constexpr int kWorkBytes = 32;
inline constexpr int kTileSlots = 4;  // tiles handed from the scheduling warp to the others

/// Element: detail::Float16 or BFloat16. kHeadDim: the bucket that head_dim and head_dim_v fit in.
template <class Element_, int kHeadDim_, FwdKind kKind, FwdSize kSize = FwdSize::large>
struct FwdTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kKind == FwdKind::general;
  /// Tiles all cost the same, so each block takes every gridDim.x-th; otherwise blocks draw them from a counter, which
  /// costs a hand-over a tile (2–3 % at D128) and evens out causal tiles (10–15 %).
  static constexpr bool kEven = kKind == FwdKind::full;
  static constexpr FwdTile kTile = fwd_tile(kHeadDim, kKind, kSize);
  /// A block's first half of keys is a product of its own where only that is seen.
  static constexpr bool kHalfFirst = kKind == FwdKind::positional && kTile.block_n == 128;
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kQBuffers = kTile.q_buffers;
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kPanels = (kHeadDim + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kQBytes = kPanels * kBlockM * kPanelRowBytes;
  static constexpr int kKBytes = kPanels * kBlockN * kPanelRowBytes;
};

/// Where things lie in shared memory, as offsets from its 1024-byte aligned start.
template <class Traits>
struct SharedPlan {
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + Traits::kQBuffers * Traits::kQBytes;
  static constexpr int kV = kK + Traits::kStages * Traits::kKBytes;
  static constexpr int kOut = kV + Traits::kStages * Traits::kKBytes;
  static constexpr int kBarriers = kOut + (Traits::kTile.separate_out ? Traits::kQBytes : 0);
  static constexpr int kFullQ = kBarriers;
  static constexpr int kEmptyQ = kFullQ + 8 * Traits::kQBuffers;
  static constexpr int kFullK = kEmptyQ + 8 * Traits::kQBuffers;
  static constexpr int kEmptyK = kFullK + 8 * Traits::kStages;
  static constexpr int kFullV = kEmptyK + 8 * Traits::kStages;
  static constexpr int kEmptyV = kFullV + 8 * Traits::kStages;
  static constexpr int kFullTile = kEmptyV + 8 * Traits::kStages;
  static constexpr int kEmptyTile = kFullTile + 8 * kTileSlots;
  static constexpr int kTiles = (kEmptyTile + 8 * kTileSlots + 15) / 16 * 16;
  static constexpr int kSpoilt = kTiles + kWorkBytes * kTileSlots;  // whether this block has flagged a row
  static constexpr int kBytes = kSpoilt + 4;
  static_assert(kBytes <= 232448, "more shared memory than a block can have on sm_90");
};

/// What the kernel needs beside the tensor maps.
struct FwdArgs {
  tile::TileOrder order;      // where sequences differ, of the longest
  tile::TileCounter counter;  // of tiles and blocks that are done; none in even kernels
  bool draws;                 // blocks draw tiles from the counter, else take every gridDim.x-th
  bool octaves;               // tiles come by octaves of their length
  int last_tiles;             // where the last rounds begin: from there on no block holds tiles in store
  int short_tile;             // key blocks of a tile, at most, behind which more may be held
  tile::KeyWindow window;
  std::uint8_t* spoilt;  // a flag per 16 rows, see common/repair.h; null in even kernels
  unsigned* any_spoilt;  // holds the counter's tag if any flag is set
  int flags_per_head;
  int seqlen_q;
  int heads_q;
  int group;
  bool sequences;    // lengths differ from batch to batch
  bool packed;       // rows of all sequences lie one behind the other
  int q_batch_step;  // 0 where broadcast over batch or heads (stride 0) or packed, else 1
  int q_head_step;
  int k_batch_step;
  int k_head_step;
  int v_batch_step;
  int v_head_step;
  float scale_log2;  // of the scores that the softmax sees: scale·log2e, in the general kernel log2e
  float threshold;   // lazy maximum, in the same scores
  detail::Params params;
};

/// Which tile of queries.
struct alignas(16) FwdPlace {
  int m_block;  // −1: there is no more
  int head;
  int batch;
  int q_begin;  // row of the sequence's first query in the tensor
};

/// The sequence that it belongs to.
struct alignas(16) FwdLengths {
  int seqlen_q;
  int seqlen_k;
  int shift;    // of the diagonal
  int k_begin;  // row of the sequence's first key in the tensor

  __device__ __forceinline__ tile::KeyWindow window(const FwdArgs& args) const {
    return {seqlen_k, shift, args.window.left, args.window.right};
  }
  /// Of the diagonal that ends at the last query and the last key, whatever the causal rule.
  __device__ __forceinline__ int shift_of_last() const { return seqlen_k - seqlen_q; }
};

/// One tile of work, as the scheduling warp hands it on.
struct FwdWork {
  FwdPlace place;
  FwdLengths lengths;
};

__device__ __forceinline__ FwdPlace place_of(const FwdArgs& args, const tile::Tile& tile) {
  const int batch = tile.head / args.heads_q;
  return {tile.m_block, tile.head - batch * args.heads_q, batch, 0};
}

/// Tile `index` where all sequences are alike. Each section of heads begins with another block of queries: else, with a
/// grid that is a multiple of these, the same multiprocessors would have the last ones, which may be short.
__device__ __forceinline__ FwdPlace even_place(const FwdArgs& args, int index) {
  if (index >= args.order.tiles) return {-1, 0, 0, 0};
  tile::Tile tile = tile::tile_at(args.order, index);
  tile.m_block = (tile.m_block + tile.head / args.order.section_heads) % args.order.m_blocks;
  return place_of(args, tile);
}
__device__ __forceinline__ FwdLengths even_lengths(const FwdArgs& args) {
  return {args.seqlen_q, args.window.seqlen_k, args.window.shift, 0};
}

/// In the order of uneven kernels.
__device__ __forceinline__ tile::Tile ordered_tile(const FwdArgs& args, const tile::TileOrder& order, int index) {
  return args.octaves ? tile::tile_by_octaves(order, index) : tile::tile_at(order, index);
}
__device__ __forceinline__ FwdWork ordered_work(const FwdArgs& args, int index) {
  if (index >= args.order.tiles) return {{-1, 0, 0, 0}, {}};
  return {place_of(args, ordered_tile(args, args.order, index)), even_lengths(args)};
}

/// Finds tiles where sequences differ, sequence by sequence, for rising indices. By all lanes of a warp.
template <int kBlockM>
struct SequenceWalk {
  int batch = 0;   // the sequence at hand
  int before = 0;  // tiles of the sequences before it

  __device__ __forceinline__ FwdWork find(const FwdArgs& args, int index) {
    const detail::Params& p = args.params;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (; batch < p.size.batch; batch += 32) {  // a sequence for each lane
      const detail::Sequence s =
          batch + lane < p.size.batch ? detail::sequence_of(p, batch + lane) : detail::Sequence{};
      const int seqlen_q = static_cast<int>(s.seqlen_q);
      const int m_blocks = (seqlen_q + kBlockM - 1) / kBlockM;
      int end = m_blocks * args.heads_q;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(tile::kAllLanes, end, step);
        if (lane >= step) end += other;
      }
      const unsigned beyond = __ballot_sync(tile::kAllLanes, index < before + end);
      if (beyond == 0) {
        before += __shfl_sync(tile::kAllLanes, end, 31);
        continue;
      }
      const int found = __ffs(static_cast<int>(beyond)) - 1;
      const auto of_found = [found](int x) { return __shfl_sync(tile::kAllLanes, x, found); };
      const int blocks = of_found(m_blocks);
      batch += found;
      before += of_found(end) - blocks * args.heads_q;
      const tile::Tile tile =
          ordered_tile(args, {blocks, args.heads_q, min(args.order.section_heads, args.heads_q), blocks * args.heads_q},
                       index - before);
      FwdLengths lengths{of_found(seqlen_q), of_found(static_cast<int>(s.seqlen_k)), 0,
                         of_found(static_cast<int>(s.k_begin))};
      if (!p.position.top_left) lengths.shift = lengths.seqlen_k - lengths.seqlen_q;
      return {{tile.m_block, tile.head, batch, of_found(static_cast<int>(s.q_begin))}, lengths};
    }
    return {{-1, 0, 0, 0}, {}};
  }
};

/// The key blocks [begin, end) that the tile of queries starting at `row` looks at. Empty: begin >= end.
struct BlockRange {
  int begin;
  int end;
};

template <class Traits>
__device__ __forceinline__ BlockRange key_blocks(const tile::KeyWindow& window, int seqlen_q, int row) {
  const int last = min(row + Traits::kBlockM, seqlen_q) - 1;
  const int begin = window.begin(row);
  const int end = window.end(last);
  return {begin / Traits::kBlockN, end <= begin ? 0 : (end + Traits::kBlockN - 1) / Traits::kBlockN};
}

/// The part of a tile's blocks that the consumer's rows from `top` on look at.
template <class Traits>
__device__ __forceinline__ BlockRange own_blocks(const tile::KeyWindow& window, int seqlen_q, const BlockRange& blocks,
                                                 int top) {
  const int last = min(top + kRowsPerConsumer, seqlen_q) - 1;
  if (last < top) return {blocks.begin, blocks.begin};
  if constexpr (Traits::kEven) return blocks;
  const int end = (window.end(last) + Traits::kBlockN - 1) / Traits::kBlockN;
  const int begin = max(window.begin(top) / Traits::kBlockN, blocks.begin);
  return {begin, max(begin, min(end, blocks.end))};
}

/// The blocks of which the consumer's rows from `top` on all see every key: no mask is needed there.
template <class Traits>
__device__ __forceinline__ BlockRange whole_blocks(const tile::KeyWindow& window, int top) {
  return {(window.begin(top + kRowsPerConsumer - 1) + Traits::kBlockN - 1) / Traits::kBlockN,
          window.end(top) / Traits::kBlockN};
}

/// Stage and parity of the n-th use of a ring of buffers.
template <int kStages>
struct Ring {
  static __device__ __forceinline__ int stage(int use) { return use % kStages; }
  static __device__ __forceinline__ std::uint32_t full_parity(int use) { return (use / kStages) & 1; }
  static __device__ __forceinline__ std::uint32_t empty_parity(int use) { return full_parity(use) ^ 1; }
};

/// One warp: finds the block's tiles and hands them on, behind short ones as far ahead as there are slots, since a draw
/// takes a microsecond. Behind long ones and in the last rounds a tile is drawn when the one before is begun, no
/// earlier: what a block holds in store, no other can take.
template <class Traits>
__device__ __forceinline__ void schedule(const FwdArgs& args, std::uint32_t s_base) {
  using Plan = SharedPlan<Traits>;
  using TileRing = Ring<kTileSlots>;
  const bool leads = threadIdx.x % 32 == 0;
  SequenceWalk<Traits::kBlockM> walk;
  if (leads && blockIdx.x == 0) args.counter.open(gridDim.x);
  bool ahead = false;
  for (int index = blockIdx.x, n = 0;; ++n) {
    const int slot = TileRing::stage(n);
    if (leads) {
      ptx::barrier_wait(s_base + Plan::kEmptyTile + 8 * slot, TileRing::empty_parity(n));
      if (n > 1 && args.draws && !ahead)
        ptx::barrier_wait(s_base + Plan::kEmptyTile + 8 * TileRing::stage(n - 2), TileRing::full_parity(n - 2));
      if (n > 0) index = args.draws ? args.counter.draw() : index + gridDim.x;
    }
    index = __shfl_sync(tile::kAllLanes, index, 0);
    const FwdWork work = args.sequences ? walk.find(args, index) : ordered_work(args, index);
    const BlockRange blocks =
        key_blocks<Traits>(work.lengths.window(args), work.lengths.seqlen_q, work.place.m_block * Traits::kBlockM);
    ahead = blocks.end - blocks.begin <= args.short_tile && index < args.last_tiles;
    if (leads) {
      const std::uint32_t s_slot = s_base + Plan::kTiles + kWorkBytes * slot;
      const FwdPlace& place = work.place;
      const FwdLengths& lengths = work.lengths;
      ptx::store_shared(s_slot, place.m_block, place.head, place.batch, place.q_begin);
      ptx::store_shared(s_slot + 16, lengths.seqlen_q, lengths.seqlen_k, lengths.shift, lengths.k_begin);
      ptx::barrier_arrive(s_base + Plan::kFullTile + 8 * slot);
    }
    if (work.place.m_block < 0) break;
  }
}

/// One warp, where sequences are packed: rows that no sequence owns become empty (out 0, lse −inf).
template <class Element>
__device__ __forceinline__ void clear_unowned_rows(const detail::Params& p) {
  const detail::Sequence none{};
  const auto clear = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin + threadIdx.x % 32; row < end; row += 32)
      for (int head = 0; head < p.size.heads_q; ++head) {
        Element* out = static_cast<Element*>(p.out.data) + detail::q_offset(p.out, none, head, row);
        for (int d = 0; d < p.size.head_dim_v; ++d) detail::store(out[d], 0.0f);
        if (p.lse.data) static_cast<float*>(p.lse.data)[detail::row_offset(p.lse, none, head, row)] = -INFINITY;
      }
  };
  for (std::int64_t batch = blockIdx.x; batch < p.size.batch; batch += gridDim.x) {
    const detail::Sequence s = detail::sequence_of(p, batch);
    if (batch == 0) clear(0, s.q_begin);
    clear(s.q_begin + s.seqlen_q,
          batch + 1 < p.size.batch ? detail::sequence_of(p, batch + 1).q_begin : p.size.total_q);
  }
}

/// Reading what the scheduling warp wrote: each time anew, since registers are dearer.
__device__ __forceinline__ FwdPlace load_place(std::uint32_t s_slot) {
  const int4 x = ptx::load_shared_x4(s_slot);
  return {x.x, x.y, x.z, x.w};
}
__device__ __forceinline__ FwdLengths load_lengths(std::uint32_t s_slot) {
  const int4 x = ptx::load_shared_x4(s_slot + 16);
  return {x.x, x.y, x.z, x.w};
}

/// Where the block's n-th tile is described, once it is.
template <class Traits>
__device__ __forceinline__ std::uint32_t wait_for_tile(std::uint32_t s_base, int n) {
  using Plan = SharedPlan<Traits>;
  using TileRing = Ring<kTileSlots>;
  const int slot = TileRing::stage(n);
  ptx::barrier_wait(s_base + Plan::kFullTile + 8 * slot, TileRing::full_parity(n));
  return s_base + Plan::kTiles + kWorkBytes * slot;
}

/// By every warp that works on tiles, when it is done with the n-th.
template <class Traits>
__device__ __forceinline__ void release_tile(std::uint32_t s_base, int n) {
  ptx::barrier_arrive(s_base + SharedPlan<Traits>::kEmptyTile + 8 * Ring<kTileSlots>::stage(n));
}

}  // namespace flashcore::sm90
