// Hopper forward for problems that leave most of the chip idle: one block for 64 queries of a head.
//
// All keys and values lie in shared memory at once, and all copies are queued at the start. One or two warpgroups share
// the queries; each is a part of the keys, in one or two steps:
//
//   S0 = Q·K0ᵀ, S1 = Q·K1ᵀ queued;  soften S0;  O = P0·V0 queued;  soften S1 meanwhile;  O = O·correction + P1·V1
//   merge                            of every two rows that a thread has, the one is finished by the first warpgroup,
//                                    the other by the second: each sends the other what that finishes
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

/// kHeadDim: the bucket, 64 or 128. kKeys: of a step. kSteps: of a part.
template <class Element_, int kHeadDim_, int kKeys_, int kSteps_>
struct SmallTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kSteps = kSteps_;
  static constexpr int kPanels = kHeadDim / 64;  // of 128 bytes a row, swizzled
  static constexpr int kQBytes = kPanels * kSmallQueries * 128;
  static constexpr int kKBytes = kPanels * kKeys * 128;
  static constexpr int kPartBytes = kSteps * 2 * kKBytes;  // keys and values
  static constexpr int kPairs = kHeadDim / 8;              // of columns that a thread has of a row
};

/// What a part found for a row: the maximum as an exponent of 2 (−inf: it saw no key) and the sum of its weights.
struct SmallStats {
  float exponent;
  float sum;
};

/// Shared memory beside queries, keys and values.
template <class Traits>
struct SmallShared {
  float4 sent[kSmallParts][Traits::kPairs / 2][128];  // a row of each thread, to the other part
  SmallStats stats[kSmallQueries][kSmallParts];
  int spoilt[kSmallParts][kSmallQueries / 16];  // whether 16 rows of a part are not finite
  std::uint64_t full_q;
  std::uint64_t full_k[kSmallParts][Traits::kSteps];
  std::uint64_t full_v[kSmallParts][Traits::kSteps];
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

  __device__ __forceinline__ void issue_values(std::uint32_t (&p)[kKeys / 8], std::uint32_t s_v) {
    const std::uint64_t v = ptx::descriptor(s_v, kKeys * 128);
    ptx::keep(p);
    ptx::keep(o);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 32; ++step)
      ptx::Wgmma<kHeadDim, Element>::template registers<1>(o, p[4 * step], p[4 * step + 1], p[4 * step + 2],
                                                           p[4 * step + 3], v + step * (16 * 128 >> 4), 1);
    ptx::wgmma_commit();
    ptx::keep(o);
  }

  /// All scores are queued at once; a block is softened while the next one's scores and the last one's values are
  /// multiplied. Its own values are queued by halves, so that little is left to multiply at the end.
  template <int kBlocks>
  __device__ __forceinline__ void compute(const SmallArgs& args, std::uint32_t s_q, const SmallBlock (&blocks)[kBlocks],
                                          int row, int quad_lane) {
    float s[kBlocks][kKeys / 2];
    std::uint32_t p[kBlocks][2][kKeys / 8];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      ptx::barrier_wait(blocks[i].full_k, 0);
      issue_scores(s[i], s_q, blocks[i].s_k);
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i == 0)
        ptx::wgmma_wait<kBlocks - 1>();  // the next scores may still be multiplied
      else
        ptx::wgmma_wait<2>();  // both halves of the last values
      ptx::keep(s[i]);
      const int first_key = blocks[i].first_key;
      if (args.positional || first_key + kKeys > args.window.seqlen_k)
        tile::mask_by_position(s[i], args.window, first_key, row, quad_lane);
      softmax.take_max(s[i], args.scale_log2, args.threshold);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&weights)[kKeys / 4] = reinterpret_cast<float (&)[kKeys / 4]>(s[i][half * kKeys / 4]);
        softmax.exponentiate(weights, args.scale_log2);
        if (i > 0 && half == 0) {
          ptx::wgmma_wait<0>();
          ptx::keep(o);
          if (softmax.moved) softmax.rescale(o);
        }
        tile::pack_weights<Element>(weights, p[i][half]);
        if (half == 0) ptx::barrier_wait(blocks[i].full_v, 0);
        issue_values(p[i][half], blocks[i].s_k + Traits::kKBytes + half * kKeys / 2 * 128);
      }
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

  __device__ __forceinline__ void send(int r, float4 (&s_row)[Traits::kPairs / 2][128], int thread) const {
#pragma unroll
    for (int i = 0; i < Traits::kPairs / 2; ++i) {
      const float* x = &o[8 * i];
      s_row[i][thread] = r == 0 ? make_float4(x[0], x[1], x[4], x[5]) : make_float4(x[2], x[3], x[6], x[7]);
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
  constexpr int kPairs = Traits::kPairs;
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

  // Queries, keys and values are each queued by a warp of their own: one after the other they would take 700 clocks.
  if (lane == 0 && warp < 3) {
    const CUtensorMap* const map = warp == 0 ? &map_k : warp == 1 ? &map_q : &map_v;
    ptx::prefetch_map(map);
    const auto load = [&](std::uint32_t s_target, std::uint32_t barrier, int rows, int row, int head, int batch) {
      ptx::barrier_expect(barrier, Traits::kPanels * rows * 128);
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel)
        ptx::tma_load(s_target + panel * rows * 128, map, barrier, panel * 64, row, head, batch, ptx::kEvictLast);
    };
    const auto prefetch = [&](int row, int head, int batch) {
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel) ptx::tma_prefetch(map, panel * 64, row, head, batch);
    };
    const int q_head = head * args.q_head_step;
    const int q_batch = batch * args.q_batch_step;
    const bool keys = warp == 0;
    const int kv_head = (args.group == 1 ? head : head / args.group) * (keys ? args.k_head_step : args.v_head_step);
    const int kv_batch = batch * (keys ? args.k_batch_step : args.v_batch_step);
    // While the kernel before this one ends, what will be loaded comes to the L2 cache, through which that kernel's own
    // writes go, too. The blocks of a head each see to a share of its keys and values.
    if (warp == 1) {
      if (part == 0) {
        prefetch(first_row, q_head, q_batch);
        ptx::barrier_init(full_q, 1);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (((i * kSmallParts + part) * 2 + keys) % gridDim.x == blockIdx.x &&
            blocks[i].first_key < args.window.seqlen_k)
          prefetch(blocks[i].first_key, kv_head, kv_batch);
        ptx::barrier_init(keys ? blocks[i].full_k : blocks[i].full_v, 1);
      }
    }
    ptx::fence_barrier_init();
    cuda::wait_for_previous_kernel();
    if (warp == 1) {
      if (part == 0) load(s_q, full_q, kSmallQueries, first_row, q_head, q_batch);
      cuda::let_next_kernel_start();
    } else {
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
        if (seen[i])
          load(blocks[i].s_k + (keys ? 0 : Traits::kKBytes), keys ? blocks[i].full_k : blocks[i].full_v, Traits::kKeys,
               blocks[i].first_key, kv_head, kv_batch);
    }
  }
  // Where the results go is read from the arguments now, while nothing else is to be done.
  Element* out =
      static_cast<Element*>(args.out.data) + batch * args.out.batch + head * args.out.head + row * args.out.seq;
  std::int64_t next_row = 8 * args.out.seq;
  float* lse = args.lse.data ? static_cast<float*>(args.lse.data) + batch * args.lse.batch + head * args.lse.head +
                                   row * args.lse.seq
                             : nullptr;
  ptx::keep(out);
  ptx::keep(next_row);
  ptx::keep(lse);
  __syncthreads();

  SmallPart<Traits> own;
  const float sink =
      args.sinks.data ? detail::head_value<float>(args.sinks, batch, head, 0.0f) * tile::kLog2e : -INFINITY;
  ptx::barrier_wait(full_q, 0);  // also where no key is seen: a block must not end before its copies do
  if (seen[0] && seen[kSteps - 1])
    own.compute(args, s_q, blocks, row, lane % 4);
  else if (seen[0] || seen[kSteps - 1])
    own.template compute<1>(args, s_q, {seen[0] ? blocks[0] : blocks[kSteps - 1]}, row, lane % 4);

  // 0 · NaN of a value that a row does not see has no place in its output.
  bool spoilt = args.positional && !__all_sync(tile::kAllLanes, own.is_finite());
  SmallStats known[2][kSmallParts];  // of the thread's rows, by part
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    known[r][0] = own.stats(r, args.scale_log2);
    known[r][1] = {-INFINITY, 0.0f};
  }
  const SmallStats mine[2] = {known[0][0], known[1][0]};
  if (parts > 1) {
    if (lane % 4 == 0) {
      shared.stats[row_in_tile][part] = mine[0];
      shared.stats[row_in_tile + 8][part] = mine[1];
    }
    if (lane == 0) shared.spoilt[part][warp] = spoilt;
    own.send(1 - part, shared.sent[part], thread);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSmallParts; ++i) {
      known[0][i] = shared.stats[row_in_tile][i];
      known[1][i] = shared.stats[row_in_tile + 8][i];
    }
    spoilt = shared.spoilt[0][warp] || shared.spoilt[1][warp];
  }
  const SmallStats merged[2] = {merge_stats(known[0], sink), merge_stats(known[1], sink)};
  const auto factor = [&](float exponent, int r) {  // of what was weighted to that exponent
    if (merged[r].exponent == -INFINITY) return 0.0f;
    return __fdividef(ptx::ex2(exponent - merged[r].exponent), merged[r].sum);
  };
  const auto finish_row = [&](int r) {
    float2 pairs[kPairs];
    tile::pairs_of_row(own.o, r, pairs);
    const float scale = r == 0 ? factor(mine[0].exponent, 0) : factor(mine[1].exponent, 1);
#pragma unroll
    for (float2& x : pairs) x = make_float2(x.x * scale, x.y * scale);
    if (parts > 1) {
      const float other = r == 0 ? factor(known[0][1].exponent, 0) : factor(known[1][0].exponent, 1);
#pragma unroll
      for (int i = 0; i < kPairs / 2; ++i) {
        const float4 x = shared.sent[1 - part][i][thread];
        pairs[2 * i] = make_float2(pairs[2 * i].x + x.x * other, pairs[2 * i].y + x.y * other);
        pairs[2 * i + 1] = make_float2(pairs[2 * i + 1].x + x.z * other, pairs[2 * i + 1].y + x.w * other);
      }
    }
    tile::store_row<Element, true>(pairs, out + r * next_row, row + 8 * r < args.seqlen_q && !spoilt, args.head_dim_v,
                                   lane % 4);
  };
  if (parts > 1) {
    finish_row(part);
  } else {
    finish_row(0);
    finish_row(1);
  }
  if (part != 0) return;
  if (spoilt) return redo_rows<Traits>(args, batch, head, first_row + warp * 16);
  if (!lse || lane % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (row + 8 * r < args.seqlen_q)
      lse[8 * r * args.lse.seq] =
          merged[r].exponent == -INFINITY ? -INFINITY : (merged[r].exponent + log2f(merged[r].sum)) * tile::kLn2;
}

}  // namespace flashcore::sm90
