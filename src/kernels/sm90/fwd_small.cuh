// Hopper forward for problems that leave most of the chip idle: one block for 64 queries of a head.
//
// All keys and values lie in shared memory at once, in blocks; all copies are queued at the start. One or two
// warpgroups share the queries, each takes every second block of keys, two at most:
//
//   S0 = Q·K0ᵀ, S1 = Q·K1ᵀ queued;  soften S0;  O = P0·V0 queued;  soften S1 meanwhile;  O = O·correction + P1·V1
//   merge       each warpgroup hands half of its output's columns to the other, and stores the other half
//
// What counts here is the chain of latencies, not throughput; README.md beside this file has the measurements.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../../cuda/launch.cuh"
#include "../params.h"
#include "../ptx/barrier.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/warp.cuh"
#include "../ptx/wgmma.cuh"
#include "../semantics.h"
#include "../tile/exact_rows.cuh"
#include "../tile/mask.cuh"
#include "../tile/softmax.cuh"
#include "../tile/store.cuh"
#include "tiles.h"

namespace flashcore::sm90 {

/// kHeadDim: the bucket, 64 or 128. kKeys: of a block. kSteps: blocks of a warpgroup.
template <class Element_, int kHeadDim_, int kKeys_, int kSteps_>
struct SmallTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kSteps = kSteps_;
  static constexpr int kPanels = kHeadDim / 64;  // of 128 bytes a row, swizzled
  static constexpr int kQBytes = kPanels * kSmallQueries * 128;
  static constexpr int kKBytes = kPanels * kKeys * 128;
  static constexpr int kPartBytes = kSteps * 2 * kKBytes;  // keys and values of a warpgroup
  static constexpr int kGroups = kHeadDim / 8;             // of four accumulators: two columns of the thread's two rows
  static constexpr int kHalf = kHeadDim / 4;               // accumulators of half of the columns
};

/// What a warpgroup found for a row: the maximum as an exponent of 2 (−inf: it saw no key) and the sum of its weights.
struct SmallStats {
  float exponent;
  float sum;
};

/// Shared memory beside queries, keys and values.
template <class Traits>
struct SmallShared {
  float4 half[kSmallParts][Traits::kGroups / 2][128];  // what a warpgroup hands to the other, see send
  SmallStats stats[kSmallQueries][kSmallParts];
  std::uint64_t full_q;
  std::uint64_t full_k[kSmallParts][Traits::kSteps];
  std::uint64_t full_v[kSmallParts][Traits::kSteps];
  int spoilt[kSmallQueries / 16];  // whether any part of 16 rows is not finite
};

template <class Traits>
constexpr int small_shared_bytes(int parts) {
  constexpr int kAlignment = 1024;
  return Traits::kQBytes + parts * Traits::kPartBytes + static_cast<int>(sizeof(SmallShared<Traits>)) + kAlignment;
}

/// What every block reads comes first: a miss in the constant cache costs a tenth of the whole run.
struct SmallArgs {
  tile::KeyWindow window;
  float scale_log2;  // scale·log2e
  float threshold;   // of the lazy maximum, in raw scores
  int seqlen_q;
  int group;        // query heads per key head
  bool positional;  // some query does not see some key
  int q_batch_step;
  int q_head_step;
  int k_batch_step;
  int k_head_step;
  int v_batch_step;
  int v_head_step;
  int head_dim_v;
  detail::TensorParams out;
  detail::RowParams lse;
  detail::HeadParams sinks;
  detail::Params params;  // for rows that are done again
};

/// Keys and values of a step in shared memory.
struct SmallBlock {
  int first_key;
  std::uint32_t s_k;  // the values lie behind the keys
  std::uint32_t full_k;
  std::uint32_t full_v;
};

/// A warpgroup's share: its weighted values, not yet divided by the sum.
template <class Traits>
struct SmallPart {
  static constexpr int kKeys = Traits::kKeys;
  static constexpr int kHeadDim = Traits::kHeadDim;
  using Element = typename Traits::Element;

  float o[kHeadDim / 2] = {};
  tile::OnlineSoftmax softmax;

  static __device__ __forceinline__ void issue_scores(float (&s)[kKeys / 2], std::uint32_t s_q, std::uint32_t s_k) {
    const std::uint64_t q = ptx::descriptor(s_q, 16);
    const std::uint64_t k = ptx::descriptor(s_k, 16);
    ptx::keep(s);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step)
      ptx::Wgmma<kKeys, Element>::template shared<0>(s, q + step / 4 * (kSmallQueries * 128 >> 4) + step % 4 * 2,
                                                     k + step / 4 * (kKeys * 128 >> 4) + step % 4 * 2, step > 0);
    ptx::wgmma_commit();
    ptx::keep(s);
  }

  __device__ __forceinline__ void issue_values(std::uint32_t (&p)[kKeys / 4], std::uint32_t s_v) {
    const std::uint64_t v = ptx::descriptor(s_v, kKeys * 128);
    ptx::keep(p);
    ptx::keep(o);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      ptx::Wgmma<kHeadDim, Element>::template registers<1>(o, p[4 * step], p[4 * step + 1], p[4 * step + 2],
                                                           p[4 * step + 3], v + step * (16 * 128 >> 4), 1);
    ptx::wgmma_commit();
    ptx::keep(o);
  }

  /// All scores are queued at once; a block is softened while the next one's scores and the last one's values are
  /// multiplied.
  template <int kBlocks>
  __device__ __forceinline__ void compute(const SmallArgs& args, std::uint32_t s_q, const SmallBlock (&blocks)[kBlocks],
                                          int row, int quad_lane) {
    float s[kBlocks][kKeys / 2];
    std::uint32_t p[kBlocks][kKeys / 4];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      ptx::barrier_wait(blocks[i].full_k, 0);
      issue_scores(s[i], s_q, blocks[i].s_k);
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      ptx::wgmma_wait<kBlocks - 1>();  // the next scores or the last values may still be multiplied
      ptx::keep(s[i]);
      const int first_key = blocks[i].first_key;
      if (args.positional || first_key + kKeys > args.window.seqlen_k)
        tile::mask_by_position(s[i], args.window, first_key, row, quad_lane);
      softmax.take_max(s[i], args.scale_log2, args.threshold);
      softmax.exponentiate(s[i], args.scale_log2);
      if (i > 0) {
        ptx::wgmma_wait<0>();
        ptx::keep(o);
        if (softmax.moved) softmax.rescale(o);
      }
      tile::pack_weights<Element>(s[i], p[i]);
      ptx::barrier_wait(blocks[i].full_v, 0);
      issue_values(p[i], blocks[i].s_k + Traits::kKBytes);
    }
    ptx::wgmma_wait<0>();
    ptx::keep(o);
  }

  __device__ __forceinline__ SmallStats stats(int r, float scale_log2) const {
    const float sum = tile::quad_sum(softmax.sum[r]);
    // A NaN hides from maxima: the row sees keys, and its sum tells of it.
    return {sum != sum ? 0.0f : softmax.max[r] * scale_log2, sum};
  }

  __device__ __forceinline__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (float x : o) finite = finite && fabsf(x) < INFINITY;
    return finite;
  }

  /// Half `kWhich` of the columns to the other warpgroup.
  template <int kWhich>
  __device__ __forceinline__ void send(float4 (&s_half)[Traits::kGroups / 2][128], int thread) const {
#pragma unroll
    for (int i = 0; i < Traits::kGroups / 2; ++i) {
      const float* x = &o[kWhich * Traits::kHalf + 4 * i];
      s_half[i][thread] = make_float4(x[0], x[1], x[2], x[3]);
    }
  }

  /// Half `kWhich` of both warpgroups' columns, each row scaled with the factor of whose it is.
  template <int kWhich>
  __device__ __forceinline__ void join(float (&sum)[Traits::kHalf], const float4 (&s_half)[Traits::kGroups / 2][128],
                                       int thread, const float (&own)[2], const float (&other)[2]) const {
#pragma unroll
    for (int i = 0; i < Traits::kGroups / 2; ++i) {
      const float* x = &o[kWhich * Traits::kHalf + 4 * i];
      const float4 y = s_half[i][thread];
      sum[4 * i] = x[0] * own[0] + y.x * other[0];
      sum[4 * i + 1] = x[1] * own[0] + y.y * other[0];
      sum[4 * i + 2] = x[2] * own[1] + y.z * other[1];
      sum[4 * i + 3] = x[3] * own[1] + y.w * other[1];
    }
  }
};

/// What the warpgroups know of a row together, with the sink's weight (unless the row sees no key). `sink`: an exponent
/// of 2, −inf where there is none.
__device__ __forceinline__ SmallStats merge_stats(const SmallStats (&parts)[kSmallParts], float sink) {
  SmallStats merged{fmaxf(parts[0].exponent, parts[1].exponent), 0.0f};
  if (merged.exponent == -INFINITY) return merged;
  merged.exponent = fmaxf(merged.exponent, sink);
  merged.sum = parts[0].sum * ptx::ex2(parts[0].exponent - merged.exponent) +
               parts[1].sum * ptx::ex2(parts[1].exponent - merged.exponent) + ptx::ex2(sink - merged.exponent);
  return merged;
}

/// The warp's 16 rows again, touching only the keys that each sees. Seldom called: not to be inlined.
template <class Traits>
__device__ __noinline__ void redo_rows(const SmallArgs& args, int batch, int head, int first) {
  for (int i = first; i < min(first + 16, args.seqlen_q); ++i)
    tile::exact_row<typename Traits::Element, Traits::kHeadDim>(args.params, batch, head, i);
}

/// Grid: (query blocks, heads_q, batch). Threads: a warpgroup for each part of the keys.
template <class Traits>
__global__ void __launch_bounds__(128 * kSmallParts, 1)
    fwd_small(const __grid_constant__ SmallArgs args, const __grid_constant__ CUtensorMap map_q,
              const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v) {
  using Element = typename Traits::Element;
  constexpr int kSteps = Traits::kSteps;
  constexpr int kHalf = Traits::kHalf;
  static_assert(kSmallParts == 2 && kSteps <= 2);
  extern __shared__ unsigned char s_raw[];
  unsigned char* s_memory = s_raw + (-ptx::shared_address(s_raw) & 1023u);
  const int parts = static_cast<int>(blockDim.x) / 128;
  SmallShared<Traits>& shared =
      *reinterpret_cast<SmallShared<Traits>*>(s_memory + Traits::kQBytes + parts * Traits::kPartBytes);
  const int head = static_cast<int>(blockIdx.y);
  const int batch = static_cast<int>(blockIdx.z);
  const int first_row = static_cast<int>(blockIdx.x) * kSmallQueries;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int part = __shfl_sync(tile::kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int row_in_tile = warp * 16 + lane / 4;  // the thread's first; its second is 8 further
  const int row = first_row + row_in_tile;
  const std::uint32_t s_q = ptx::shared_address(s_memory);
  const std::uint32_t full_q = ptx::shared_address(&shared.full_q);

  // The part's blocks, and whether some query of the tile sees one of their keys.
  SmallBlock blocks[kSteps];
  bool seen[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int first_key = (i * parts + part) * Traits::kKeys;
    blocks[i] = {first_key, s_q + Traits::kQBytes + (part * kSteps + i) * 2 * Traits::kKBytes,
                 ptx::shared_address(&shared.full_k[part][i]), ptx::shared_address(&shared.full_v[part][i])};
    seen[i] = first_key < args.window.end(min(first_row + kSmallQueries, args.seqlen_q) - 1) &&
              first_key + Traits::kKeys > args.window.begin(first_row);
  }

  if (warp == 0 && lane < 3) ptx::prefetch_map(lane == 0 ? &map_k : lane == 1 ? &map_q : &map_v);
  if (thread == 0) {
    const auto load = [](const CUtensorMap* map, std::uint32_t s_target, std::uint32_t barrier, int rows, int row,
                         int head, int batch) {
      ptx::barrier_expect(barrier, Traits::kPanels * rows * 128);
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel)
        ptx::tma_load(s_target + panel * rows * 128, map, barrier, panel * 64, row, head, batch, ptx::kEvictLast);
    };
    if (part == 0) ptx::barrier_init(full_q, 1);
#pragma unroll
    for (const SmallBlock& block : blocks) {
      ptx::barrier_init(block.full_k, 1);
      ptx::barrier_init(block.full_v, 1);
    }
    ptx::fence_barrier_init();
    cuda::wait_for_previous_kernel();
    const int head_k = args.group == 1 ? head : head / args.group;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const SmallBlock& block = blocks[i];
      if (seen[i])
        load(&map_k, block.s_k, block.full_k, Traits::kKeys, block.first_key, head_k * args.k_head_step,
             batch * args.k_batch_step);
      if (i == 0 && part == 0)
        load(&map_q, s_q, full_q, kSmallQueries, first_row, head * args.q_head_step, batch * args.q_batch_step);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const SmallBlock& block = blocks[i];
      if (seen[i])
        load(&map_v, block.s_k + Traits::kKBytes, block.full_v, Traits::kKeys, block.first_key,
             head_k * args.v_head_step, batch * args.v_batch_step);
    }
    cuda::let_next_kernel_start();
  }
  if (threadIdx.x < kSmallQueries / 16) shared.spoilt[threadIdx.x] = 0;
  __syncthreads();

  SmallPart<Traits> own;
  ptx::barrier_wait(full_q, 0);  // also where no key is seen: a block must not end before its copies do
  if (seen[0] && seen[kSteps - 1])
    own.compute(args, s_q, blocks, row, lane % 4);
  else if (seen[0] || seen[kSteps - 1])
    own.template compute<1>(args, s_q, {seen[0] ? blocks[0] : blocks[kSteps - 1]}, row, lane % 4);

  const float sink =
      args.sinks.data ? detail::head_value<float>(args.sinks, batch, head, 0.0f) * tile::kLog2e : -INFINITY;
  // 0 · NaN of a value that a row does not see has no place in its output.
  bool spoilt = args.positional && !__all_sync(tile::kAllLanes, own.is_finite());
  SmallStats known[2][kSmallParts];  // of the thread's rows, by part
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    known[r][0] = own.stats(r, args.scale_log2);
    known[r][1] = {-INFINITY, 0.0f};
  }
  if (parts > 1) {
    if (lane % 4 == 0) {
      shared.stats[row_in_tile][part] = known[0][0];
      shared.stats[row_in_tile + 8][part] = known[1][0];
    }
    if (spoilt && lane == 0) shared.spoilt[warp] = 1;
    if (part == 0)
      own.template send<1>(shared.half[0], thread);
    else
      own.template send<0>(shared.half[1], thread);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSmallParts; ++i) {
      known[0][i] = shared.stats[row_in_tile][i];
      known[1][i] = shared.stats[row_in_tile + 8][i];
    }
    spoilt = shared.spoilt[warp] != 0;
  }
  SmallStats merged[2];
  float factor[kSmallParts][2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    merged[r] = merge_stats(known[r], sink);
#pragma unroll
    for (int i = 0; i < kSmallParts; ++i)
      factor[i][r] = merged[r].exponent == -INFINITY
                         ? 0.0f
                         : __fdividef(ptx::ex2(known[r][i].exponent - merged[r].exponent), merged[r].sum);
  }

  Element* const out =
      static_cast<Element*>(args.out.data) + batch * args.out.batch + head * args.out.head + row * args.out.seq;
  const bool exists[2] = {row < args.seqlen_q && !spoilt, row + 8 < args.seqlen_q && !spoilt};
  const auto store = [&](const auto& o, int first_column) {
    tile::store_rows<Element, true>(o, out + first_column, 8 * args.out.seq, exists, args.head_dim_v - first_column,
                                    lane % 4);
  };
  if (parts == 1) {
#pragma unroll
    for (int i = 0; i < Traits::kHeadDim / 2; ++i) own.o[i] *= factor[0][i >> 1 & 1];
    store(own.o, 0);
  } else {
    float half[kHalf];
    if (part == 0)
      own.template join<0>(half, shared.half[1], thread, factor[0], factor[1]);
    else
      own.template join<1>(half, shared.half[0], thread, factor[1], factor[0]);
    store(half, part * Traits::kHeadDim / 2);
  }
  if (part != 0) return;
  if (spoilt) return redo_rows<Traits>(args, batch, head, first_row + warp * 16);
  if (args.lse.data && lane % 4 == 0) {
    float* lse = static_cast<float*>(args.lse.data) + batch * args.lse.batch + head * args.lse.head;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (row + 8 * r < args.seqlen_q)
        lse[(row + 8 * r) * args.lse.seq] =
            merged[r].exponent == -INFINITY ? -INFINITY : (merged[r].exponent + log2f(merged[r].sum)) * tile::kLn2;
  }
}

}  // namespace flashcore::sm90
