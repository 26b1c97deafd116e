// Hopper forward: warp-specialised FlashAttention with TMA and wgmma.
//
// A block has one producer warpgroup (one thread of it loads Q, K and V by TMA) and two or three consumer warpgroups of
// 64 query rows each. Blocks are persistent; the producer draws the next tile (tile/scheduler.cuh) and hands it on. Per
// tile, keys are taken from the last block to the first, so that masked blocks come first:
//
//   S = Q·K[n]ᵀ                        wgmma, both operands in shared memory, S in registers
//   P = 2^(S·c − m·c), m lazily         tile/softmax.cuh
//   for the other blocks:  issue S' = Q·K[n−1]ᵀ and O += P·V[n] together; soften S' while O is still computed
//   O += P·V[0];  O /= sum;  store through shared memory by TMA, a warp at a time
//
//   time ->   producer   | K3 Q V3 | K2 V2 | K1 V1 | K0 V0 | next tile's K3 Q …
//             consumer 0 | S3 softmax | S2 + PV3, softmax 2 | S1 + PV2, softmax 1 | …
//             consumer 1 |     S3 softmax | S2 + PV3, softmax 2 | …       (a turn apart: one multiplies, one softens)
//
// The schedule is FlashAttention-3's (Shah et al. 2024), with an output buffer of its own and a lazy maximum. README.md
// beside this file has the budgets and what was tried.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../params.h"
#include "../ptx/barrier.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/warp.cuh"
#include "../ptx/wgmma.cuh"
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
inline constexpr int kTileSlots = 2;  // tile indices handed from the producer to the consumers

/// Element: detail::Float16 or BFloat16. kHeadDim: the bucket that head_dim and head_dim_v fit in.
template <class Element_, int kHeadDim_, FwdKind kKind>
struct FwdTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kKind == FwdKind::general;
  /// Tiles all cost the same, so each block takes every gridDim.x-th; otherwise blocks draw them from a counter, which
  /// costs a hand-over a tile (2–3 % at D128) and evens out causal tiles (10–15 %).
  static constexpr bool kEven = kKind == FwdKind::full;
  static constexpr FwdTile kTile = fwd_tile(kHeadDim, kGeneral);
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
  static constexpr int kTiles = kEmptyTile + 8 * kTileSlots;
  static constexpr int kBytes = kTiles + 4 * kTileSlots;
  static_assert(kBytes <= 232448, "more shared memory than a block can have on sm_90");
};

/// What the kernel needs beside the tensor maps.
struct FwdArgs {
  tile::TileOrder order;
  unsigned* next_tile;  // a zeroed counter from which blocks draw tiles; null in even kernels, or if one round does
  tile::KeyWindow window;
  std::uint8_t* spoilt;  // a flag per 16 rows: [batch · head][query block][warp]; null in even kernels
  int seqlen_q;
  int heads_q;
  int group;
  int k_batch_step;  // 0 where keys are broadcast over batch or heads (stride 0), else 1
  int k_head_step;
  int v_batch_step;
  int v_head_step;
  int q_batch_step;
  int q_head_step;
  float scale_log2;  // of the scores that the softmax sees: scale·log2e, in the general kernel log2e
  float threshold;   // lazy maximum, in the same scores
  detail::Params params;
};

/// The key blocks [begin, end) that the tile of queries starting at `row` looks at. Empty: begin >= end.
struct BlockRange {
  int begin;
  int end;
};

template <class Traits>
__device__ __forceinline__ BlockRange key_blocks(const FwdArgs& args, int row) {
  const int last = min(row + Traits::kBlockM, args.seqlen_q) - 1;
  const int begin = args.window.begin(row);
  const int end = args.window.end(last);
  return {begin / Traits::kBlockN, end <= begin ? 0 : (end + Traits::kBlockN - 1) / Traits::kBlockN};
}

/// The part of a tile's blocks that the consumer's rows from `top` on look at.
template <class Traits>
__device__ __forceinline__ BlockRange own_blocks(const FwdArgs& args, const BlockRange& blocks, int top) {
  if constexpr (Traits::kEven) return blocks;
  const int last = min(top + kRowsPerConsumer, args.seqlen_q) - 1;
  if (last < top) return {blocks.begin, blocks.begin};
  const int end = (args.window.end(last) + Traits::kBlockN - 1) / Traits::kBlockN;
  const int begin = max(args.window.begin(top) / Traits::kBlockN, blocks.begin);
  return {begin, max(begin, min(end, blocks.end))};
}

/// Stage and parity of the n-th use of a ring of buffers.
template <int kStages>
struct Ring {
  static __device__ __forceinline__ int stage(int use) { return use % kStages; }
  static __device__ __forceinline__ std::uint32_t full_parity(int use) { return (use / kStages) & 1; }
  static __device__ __forceinline__ std::uint32_t empty_parity(int use) { return full_parity(use) ^ 1; }
};

/// One thread: loads Q, K and V of every tile of the block, as buffers fall free.
template <class Traits>
__device__ __forceinline__ void produce(const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v,
                                        const FwdArgs& args, std::uint32_t s_base) {
  using Plan = SharedPlan<Traits>;
  using KvRing = Ring<Traits::kStages>;
  using QRing = Ring<Traits::kQBuffers>;
  using TileRing = Ring<kTileSlots>;
  const auto load_panels = [](const CUtensorMap* map, std::uint32_t s_target, std::uint32_t barrier, int rows, int row,
                              int head, int batch, std::uint64_t hint) {
    for (int panel = 0; panel < Traits::kPanels; ++panel)
      ptx::tma_load(s_target + panel * rows * kPanelRowBytes, map, barrier, panel * kPanelColumns, row, head, batch,
                    hint);
  };
  int kv_use = 0;
  int q_use = 0;
  int index = blockIdx.x;
  for (int n = 0;; ++n) {
    if constexpr (!Traits::kEven) {
      const int slot = TileRing::stage(n);
      ptx::barrier_wait(s_base + Plan::kEmptyTile + 8 * slot, TileRing::empty_parity(n));
      ptx::store_shared(s_base + Plan::kTiles + 4 * slot, index);
      ptx::barrier_arrive(s_base + Plan::kFullTile + 8 * slot);
    }
    if (index >= args.order.tiles) break;
    // Drawn now, used when this tile's loads are queued: its latency is hidden.
    const bool draw = !Traits::kEven && args.next_tile;
    const int next = (draw ? static_cast<int>(atomicAdd(args.next_tile, 1u)) : index) + gridDim.x;
    const tile::Tile tile = tile::tile_at(args.order, index);
    const int batch = tile.head / args.heads_q;
    const int head = tile.head - batch * args.heads_q;
    const int head_k = head / args.group;
    const int row = tile.m_block * Traits::kBlockM;
    const auto load_q = [&] {
      const int buffer = QRing::stage(q_use);
      const std::uint32_t full_q = s_base + Plan::kFullQ + 8 * buffer;
      ptx::barrier_wait(s_base + Plan::kEmptyQ + 8 * buffer, QRing::empty_parity(q_use));
      ptx::barrier_expect(full_q, Traits::kQBytes);
      load_panels(map_q, s_base + Plan::kQ + buffer * Traits::kQBytes, full_q, Traits::kBlockM, row,
                  head * args.q_head_step, batch * args.q_batch_step, ptx::kEvictFirst);
      ++q_use;
    };
    const BlockRange blocks = key_blocks<Traits>(args, row);
    if (blocks.begin >= blocks.end) load_q();
    for (int block = blocks.end - 1; block >= blocks.begin; --block, ++kv_use) {
      const int stage = KvRing::stage(kv_use);
      const std::uint32_t full_k = s_base + Plan::kFullK + 8 * stage;
      const std::uint32_t full_v = s_base + Plan::kFullV + 8 * stage;
      ptx::barrier_wait(s_base + Plan::kEmptyK + 8 * stage, KvRing::empty_parity(kv_use));
      ptx::barrier_expect(full_k, Traits::kKBytes);
      load_panels(map_k, s_base + Plan::kK + stage * Traits::kKBytes, full_k, Traits::kBlockN, block * Traits::kBlockN,
                  head_k * args.k_head_step, batch * args.k_batch_step, ptx::kEvictLast);
      if (block == blocks.end - 1) load_q();  // after the first keys: with one query buffer it must not delay them
      ptx::barrier_wait(s_base + Plan::kEmptyV + 8 * stage, KvRing::empty_parity(kv_use));
      ptx::barrier_expect(full_v, Traits::kKBytes);
      load_panels(map_v, s_base + Plan::kV + stage * Traits::kKBytes, full_v, Traits::kBlockN, block * Traits::kBlockN,
                  head_k * args.v_head_step, batch * args.v_batch_step, ptx::kEvictLast);
    }
    index = next;
  }
}

/// Softcap, ALiBi, bias and mask on a block of scores: raw products in, scores in natural units out.
template <class Traits, int N>
__device__ __forceinline__ void general_scores(float (&s)[N], const FwdArgs& args, int batch, int head, int first_key,
                                               int row, int quad_lane) {
  using Element = typename Traits::Element;
  const detail::Params& p = args.params;
  const float scale = static_cast<float>(p.score.scale);
  const float cap = static_cast<float>(p.score.softcap);
  const float to_exponent = cap > 0 ? 2 * tile::kLog2e / cap : 0.0f;
  const float slope = detail::head_value<float>(p.alibi, batch, head, 0.0f);
  const bool bias_is_float = p.bias.dtype == DType::float32;
  const int first = first_key + 2 * quad_lane;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = row + 8 * r;
    const int keys = i < args.seqlen_q ? args.window.seqlen_k - first : 0;  // of this row, from `first` on
    const std::int64_t bias_row = detail::plane_offset(p.bias, batch, head, i, first);
    const std::uint8_t* mask_row =
        static_cast<const std::uint8_t*>(p.mask.data) + detail::plane_offset(p.mask, batch, head, i, first);
    const float diagonal = static_cast<float>(i + args.window.seqlen_k - args.seqlen_q - first);
#pragma unroll
    for (int e = 0; e < N / 2; ++e) {
      const int column = 8 * (e >> 1) + (e & 1);
      float& score = s[4 * (e >> 1) + 2 * r + (e & 1)];
      float x = score * scale;
      // tanh(y) = 1 − 2 / (1 + e^2y): exact to float rounding, where tanh.approx is only good to 2^-11.
      if (cap > 0) x = cap * (1.0f - __fdividef(2.0f, 1.0f + ptx::ex2(x * to_exponent)));
      if (p.alibi.data) x -= slope * fabsf(diagonal - static_cast<float>(column));
      if (p.bias.data && column < keys) {
        const std::int64_t at = bias_row + column * p.bias.key;
        x += bias_is_float ? static_cast<const float*>(p.bias.data)[at]
                           : detail::load(static_cast<const Element*>(p.bias.data)[at]);
      }
      if (p.mask.data && column < keys && !mask_row[column * p.mask.key]) x = -INFINITY;
      score = x;
      if (e % 8 == 7) asm volatile("" ::: "memory");  // a few loads ahead are enough: more would cost registers
    }
  }
}

/// A consumer warpgroup: its registers' meaning and the steps of the algorithm as verbs.
template <class Traits>
struct Consumer {
  using Element = typename Traits::Element;
  using Plan = SharedPlan<Traits>;
  using KvRing = Ring<Traits::kStages>;
  using QRing = Ring<Traits::kQBuffers>;
  using TileRing = Ring<kTileSlots>;
  static constexpr int kBlockM = Traits::kBlockM;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kFirstTurn = 1;  // named barriers kFirstTurn + consumer: whose turn to multiply it is

  const FwdArgs& args;
  std::uint32_t s_base;
  int consumer;  // which warpgroup, from 0
  int thread;    // in the warpgroup
  int kv_use = 0;
  int q_use = 0;
  unsigned seen = 0;  // general: bit r, this thread met a score above −inf in its row r

  __device__ __forceinline__ int lane() const { return thread & 31; }
  __device__ __forceinline__ int warp() const { return thread >> 5; }
  __device__ __forceinline__ int quad_lane() const { return thread & 3; }
  /// The thread's first row in the tile; its second is 8 further.
  __device__ __forceinline__ int row_in_tile() const {
    return consumer * kRowsPerConsumer + warp() * 16 + (lane() >> 2);
  }

  __device__ __forceinline__ void take_turn() const { ptx::named_sync(kFirstTurn + consumer, 2 * kWarpgroup); }
  __device__ __forceinline__ void give_turn() const {
    ptx::named_arrive(kFirstTurn + (consumer + 1) % Traits::kConsumers, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void wait_full(int barriers, int stage, std::uint32_t parity) const {
    ptx::barrier_wait(s_base + barriers + 8 * stage, parity);
  }
  /// One thread speaks for its warpgroup: the products that read the buffer are complete in all four warps.
  __device__ __forceinline__ void release(int barriers, int stage) const {
    if (thread == 0) ptx::barrier_arrive(s_base + barriers + 8 * stage);
  }

  /// Lets blocks pass that only other consumers look at. `turns` of them are taken and given on, as those do.
  __device__ __forceinline__ void pass(int count, int turns) {
    for (; count > 0; --count, --turns, ++kv_use) {
      const int stage = KvRing::stage(kv_use);
      // Not released before it is full: the next round's release could come in this one.
      wait_full(Plan::kFullK, stage, KvRing::full_parity(kv_use));
      release(Plan::kEmptyK, stage);
      wait_full(Plan::kFullV, stage, KvRing::full_parity(kv_use));
      release(Plan::kEmptyV, stage);
      if (turns <= 0) continue;
      take_turn();
      give_turn();
    }
  }

  /// S = Q·Kᵀ, queued. Both tiles lie in panels of 64 columns; a step of 16 columns is 32 bytes in a panel's row.
  __device__ __forceinline__ void issue_scores(float (&s)[kBlockN / 2], int q_buffer, int stage) const {
    const std::uint64_t q = ptx::descriptor(
        s_base + Plan::kQ + q_buffer * Traits::kQBytes + consumer * kRowsPerConsumer * kPanelRowBytes, 16);
    const std::uint64_t k = ptx::descriptor(s_base + Plan::kK + stage * Traits::kKBytes, 16);
    ptx::keep(s);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step)
      ptx::Wgmma<kBlockN, Element>::template shared<0>(s, q + step / 4 * (kBlockM * kPanelRowBytes >> 4) + step % 4 * 2,
                                                       k + step / 4 * (kBlockN * kPanelRowBytes >> 4) + step % 4 * 2,
                                                       step > 0);
    ptx::wgmma_commit();
    ptx::keep(s);
  }

  /// O += P·V, queued. V is read transposed: 16 keys are 16 rows of 128 bytes further on.
  __device__ __forceinline__ void issue_values(float (&o)[kHeadDim / 2], std::uint32_t (&p)[kBlockN / 4],
                                               int stage) const {
    const std::uint64_t v = ptx::descriptor(s_base + Plan::kV + stage * Traits::kKBytes, kBlockN * kPanelRowBytes);
    ptx::keep(p);
    ptx::keep(o);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockN / 16; ++step)
      ptx::Wgmma<kHeadDim, Element>::template registers<1>(o, p[4 * step], p[4 * step + 1], p[4 * step + 2],
                                                           p[4 * step + 3], v + step * (16 * kPanelRowBytes >> 4), 1);
    ptx::wgmma_commit();
    ptx::keep(o);
    ptx::keep(p);
  }

  /// With a sink the sum no longer tells whether a row saw any key; masks and biases decide it score by score.
  __device__ __forceinline__ void look_for_keys(const float (&s)[kBlockN / 2]) {
    if (!args.params.sinks.data) return;
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) seen |= s[i] == -INFINITY ? 0u : 1u << (i >> 1 & 1);
  }

  /// Whether row r (0 or 1) of the thread saw no key at all: such a row is empty, whatever its sink. By all lanes.
  __device__ __forceinline__ bool is_empty(int row, int r) const {
    if (!args.params.sinks.data) return false;  // the sum tells
    if (Traits::kGeneral) return tile::quad_max(seen >> r & 1 ? 1.0f : 0.0f) == 0.0f;
    return args.window.begin(row + 8 * r) >= args.window.end(row + 8 * r);
  }

  /// Everything between the raw products and the weights of one block.
  __device__ __forceinline__ void soften(float (&s)[kBlockN / 2], tile::OnlineSoftmax& softmax, int batch, int head,
                                         int row, int block) {
    const int first_key = block * kBlockN;
    if constexpr (Traits::kGeneral) general_scores<Traits>(s, args, batch, head, first_key, row, quad_lane());
    // Wholly visible blocks need no mask: rows of the warpgroup from `top` to `top` + 63.
    const int top = row - row_in_tile() + consumer * kRowsPerConsumer;
    if (first_key + kBlockN > args.window.end(top) || first_key < args.window.begin(top + kRowsPerConsumer - 1))
      tile::mask_by_position(s, args.window, first_key, row, quad_lane());
    softmax.take_max(s, args.scale_log2, args.threshold);
    if constexpr (Traits::kGeneral) look_for_keys(s);
    softmax.exponentiate(s, args.scale_log2);
  }

  /// Rows to shared memory and from there to global memory, each warp its own 16 rows.
  __device__ __forceinline__ void store(const CUtensorMap* map_out, const float (&o)[kHeadDim / 2], int q_buffer,
                                        int row, int head, int batch) const {
    const std::uint32_t s_out = s_base +
                                (Traits::kTile.separate_out ? Plan::kOut : Plan::kQ + q_buffer * Traits::kQBytes) +
                                (consumer * kRowsPerConsumer + warp() * 16) * kPanelRowBytes;
    if (Traits::kTile.separate_out) {  // the last tile's store has read the buffer
      ptx::bulk_wait_read<0>();
      __syncwarp();
    }
    const int r = lane() & 15;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const int chunk = (i % 4 * 2 + (lane() >> 4)) ^ (r & 7);  // 128-byte swizzle: 16-byte chunks by row
      const float* x = &o[8 * i];
      ptx::store_matrix_x4(s_out + i / 4 * kBlockM * kPanelRowBytes + r * kPanelRowBytes + chunk * 16,
                           ptx::pack<Element>(x[0], x[1]), ptx::pack<Element>(x[2], x[3]),
                           ptx::pack<Element>(x[4], x[5]), ptx::pack<Element>(x[6], x[7]));
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane() != 0) return;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel)
      ptx::tma_store(map_out, s_out + panel * kBlockM * kPanelRowBytes, panel * kPanelColumns, row, head,
                     batch);  // lane 0: the warp's first row
    ptx::bulk_commit();
    if (!Traits::kTile.separate_out) {
      ptx::bulk_wait_read<0>();
      ptx::barrier_arrive(s_base + Plan::kEmptyQ + 8 * q_buffer);
    }
  }

  __device__ __forceinline__ void store_lse(const tile::OnlineSoftmax& softmax, int row, int head, int batch) const {
    const detail::RowParams& lse = args.params.lse;
    if (!lse.data) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float value = is_empty(row, r) ? -INFINITY : softmax.lse(r, args.scale_log2);
      if (quad_lane() == 0 && row + 8 * r < args.seqlen_q)
        static_cast<float*>(lse.data)[batch * lse.batch + head * lse.head + (row + 8 * r) * lse.seq] = value;
    }
  }

  /// The index of the block's n-th tile.
  __device__ __forceinline__ int receive_tile(int n) const {
    if constexpr (Traits::kEven) return n * gridDim.x + blockIdx.x;
    const int slot = TileRing::stage(n);
    wait_full(Plan::kFullTile, slot, TileRing::full_parity(n));
    const int index = ptx::load_shared(s_base + Plan::kTiles + 4 * slot);
    __syncwarp();
    if (lane() == 0) ptx::barrier_arrive(s_base + Plan::kEmptyTile + 8 * slot);
    return index;
  }

  /// Leaves word for the repair kernel (common/repair.h) whether excluded keys may have spoilt the warp's 16 rows. The
  /// repair is a kernel of its own because its mere presence in this one, called or inlined, cost 8 %.
  __device__ __forceinline__ void flag_spoilt(const float (&o)[kHeadDim / 2], const tile::Tile& tile) const {
    if constexpr (Traits::kEven) return;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) finite = finite && fabsf(o[i]) < INFINITY;
    const bool spoilt = !__all_sync(tile::kAllLanes, finite);
    const int group = (tile.m_block * Traits::kConsumers + consumer) * 4 + warp();
    if (lane() == 0 && args.spoilt)
      args.spoilt[tile.head * args.order.m_blocks * Traits::kConsumers * 4 + group] = spoilt;
  }

  __device__ __forceinline__ void run_tile(const CUtensorMap* map_out, int index);
};

template <class Traits>
__device__ __forceinline__ void Consumer<Traits>::run_tile(const CUtensorMap* map_out, int index) {
  const tile::Tile tile = tile::tile_at(args.order, index);
  const int batch = tile.head / args.heads_q;
  const int head = tile.head - batch * args.heads_q;
  const int row = tile.m_block * kBlockM + row_in_tile();
  const BlockRange all = key_blocks<Traits>(args, tile.m_block * kBlockM);
  const BlockRange blocks = own_blocks<Traits>(args, all, tile.m_block * kBlockM + consumer * kRowsPerConsumer);
  const int buffer = QRing::stage(q_use);

  float o[kHeadDim / 2];
  float s[kBlockN / 2];
  std::uint32_t p[kBlockN / 4];
  tile::OnlineSoftmax softmax;
  seen = 0;
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
  if (args.params.sinks.data)
    softmax.start_with(detail::head_value<float>(args.params.sinks, batch, head, 0.0f) * tile::kLog2e / args.scale_log2,
                       args.scale_log2, quad_lane() == 0);

  wait_full(Plan::kFullQ, buffer, QRing::full_parity(q_use));
  ++q_use;
  if (!Traits::kEven && all.begin < all.end) {
    // Every consumer takes one turn less than the tile has blocks.
    const int before = blocks.begin < blocks.end ? all.end - blocks.end : all.end - all.begin;
    pass(before, blocks.begin < blocks.end ? before : before - 1);
  }
  if (blocks.begin < blocks.end) {
    wait_full(Plan::kFullK, KvRing::stage(kv_use), KvRing::full_parity(kv_use));
    issue_scores(s, buffer, KvRing::stage(kv_use));
    ptx::wgmma_wait<0>();
    ptx::keep(s);
    release(Plan::kEmptyK, KvRing::stage(kv_use));
    soften(s, softmax, batch, head, row, blocks.end - 1);
    softmax.moved = false;  // there is no output to rescale yet
    tile::pack_weights<Element>(s, p);

#pragma unroll 1
    for (int block = blocks.end - 2; block >= blocks.begin; --block) {
      const int values = KvRing::stage(kv_use);
      const std::uint32_t values_parity = KvRing::full_parity(kv_use);
      ++kv_use;
      const int keys = KvRing::stage(kv_use);
      wait_full(Plan::kFullK, keys, KvRing::full_parity(kv_use));
      take_turn();
      issue_scores(s, buffer, keys);
      if (Traits::kTile.rescale_early && softmax.moved) softmax.rescale(o);
      wait_full(Plan::kFullV, values, values_parity);
      issue_values(o, p, values);
      give_turn();
      ptx::wgmma_wait<1>();
      ptx::keep(s);
      release(Plan::kEmptyK, keys);
      soften(s, softmax, batch, head, row, block);
      ptx::wgmma_wait<0>();
      ptx::keep(o);
      release(Plan::kEmptyV, values);
      tile::pack_weights<Element>(s, p);  // not before the wait: ptxas would serialise the products (C7513)
      if (!Traits::kTile.rescale_early && softmax.moved) softmax.rescale(o);
    }
    if (Traits::kTile.rescale_early && softmax.moved) softmax.rescale(o);
    if (Traits::kTile.separate_out) release(Plan::kEmptyQ, buffer);  // its last product has been waited for
    const int values = KvRing::stage(kv_use);
    wait_full(Plan::kFullV, values, KvRing::full_parity(kv_use));
    issue_values(o, p, values);
    ptx::wgmma_wait<0>();
    ptx::keep(o);
    release(Plan::kEmptyV, values);
    ++kv_use;
    if (!Traits::kEven) pass(blocks.begin - all.begin, blocks.begin - all.begin);
  } else if (Traits::kTile.separate_out) {
    release(Plan::kEmptyQ, buffer);
  }

  flag_spoilt(o, tile);
  const float inverse[2] = {softmax.finish(0), softmax.finish(1)};
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= inverse[i >> 1 & 1];
  store(map_out, o, buffer, row, head, batch);
  store_lse(softmax, row, head, batch);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kTile.threads(), 1)
    fwd(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
        const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_out,
        const __grid_constant__ FwdArgs args) {
  using Plan = SharedPlan<Traits>;
  extern __shared__ __align__(1024) unsigned char s_memory[];
  const std::uint32_t s_base = ptx::shared_address(s_memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kQBuffers; ++i) {
      ptx::barrier_init(s_base + Plan::kFullQ + 8 * i, 1);
      // Where the output takes the queries' place, each of a consumer's four warps releases them after its store.
      ptx::barrier_init(s_base + Plan::kEmptyQ + 8 * i, Traits::kConsumers * (Traits::kTile.separate_out ? 1 : 4));
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::barrier_init(s_base + Plan::kFullK + 8 * i, 1);
      ptx::barrier_init(s_base + Plan::kFullV + 8 * i, 1);
      ptx::barrier_init(s_base + Plan::kEmptyK + 8 * i, Traits::kConsumers);
      ptx::barrier_init(s_base + Plan::kEmptyV + 8 * i, Traits::kConsumers);
    }
    for (int i = 0; i < kTileSlots; ++i) {
      ptx::barrier_init(s_base + Plan::kFullTile + 8 * i, 1);
      ptx::barrier_init(s_base + Plan::kEmptyTile + 8 * i, Traits::kConsumers * 4);  // each warp reads for itself
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(tile::kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Traits::kTile.producer_registers>();
    if (threadIdx.x < 32 && ptx::elect()) produce<Traits>(&map_q, &map_k, &map_v, args, s_base);
  } else {
    ptx::take_registers<Traits::kTile.consumer_registers>();
    Consumer<Traits> self{args, s_base, warpgroup - 1, static_cast<int>(threadIdx.x) % kWarpgroup};
    if (self.consumer == 0) ptx::named_arrive(Consumer<Traits>::kFirstTurn, 2 * kWarpgroup);  // the first turn is given
#pragma unroll 1
    for (int n = 0;; ++n) {
      const int index = self.receive_tile(n);
      if (index >= args.order.tiles) break;
      self.run_tile(&map_out, index);
    }
    ptx::bulk_wait_read<0>();  // shared memory must outlive the stores that read it
  }
}

}  // namespace flashcore::sm90
