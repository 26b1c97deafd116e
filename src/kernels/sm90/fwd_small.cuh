// Hopper forward for problems that leave most of the chip idle: one block for 64 queries of a head, no loop.
//
// All keys and values lie in shared memory at once, a part for each of up to four warpgroups, and all copies are queued
// at the start. The warpgroups share the queries:
//
//   S = Q·Kᵀ, softmax, O = P·V     each for its own keys, with its own maximum, as soon as they have come
//   merge                          the output is cut into four pieces; each warpgroup gets its share of them from the
//                                  others through shared memory, scales them to the common maximum and sum, and stores
//
// What counts here is the chain of latencies, not throughput; README.md beside this file has the measurements.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

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

/// kHeadDim: the bucket, 64 or 128. kKeys: of one warpgroup.
template <class Element_, int kHeadDim_, int kKeys_>
struct SmallTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kPanels = kHeadDim / 64;  // of 128 bytes a row, swizzled
  static constexpr int kQBytes = kPanels * kSmallQueries * 128;
  static constexpr int kKBytes = kPanels * kKeys * 128;
  static constexpr int kOutBytes = kSmallQueries * kHeadDim * 4;  // of a warpgroup, sent in its keys' and values' place
  static constexpr int kPartBytes = 2 * kKBytes > kOutBytes ? 2 * kKBytes : kOutBytes;
};

/// What a warpgroup found for a row: the maximum as an exponent of 2 (−inf: it saw no key) and the sum of its weights.
struct SmallStats {
  float exponent;
  float sum;
};

/// Shared memory beside queries, keys and values.
struct SmallShared {
  SmallStats stats[kSmallQueries][kSmallParts];
  std::uint64_t full_q;
  std::uint64_t full_k[kSmallParts];
  std::uint64_t full_v[kSmallParts];
  int spoilt[kSmallQueries / 16];  // whether any part of 16 rows is not finite
};

template <class Traits>
constexpr int small_shared_bytes(int parts) {
  constexpr int kAlignment = 1024;
  return Traits::kQBytes + parts * Traits::kPartBytes + static_cast<int>(sizeof(SmallShared)) + kAlignment;
}

/// What every block reads comes first: a miss in the constant cache costs a tenth of the whole run.
struct SmallArgs {
  tile::KeyWindow window;
  float scale_log2;  // scale·log2e
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

/// A warpgroup's keys: their weighted values, not yet divided by the sum.
template <class Traits>
struct SmallPart {
  static constexpr int kKeys = Traits::kKeys;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kPieces = 4;             // of the output: columns by halves, times the thread's rows
  static constexpr int kPairs = kHeadDim / 16;  // pairs of columns of a thread in a piece
  static constexpr int kPieceBytes = kPairs * 8 * 128;
  using Element = typename Traits::Element;

  float o[kHeadDim / 2] = {};
  float exponent[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  __device__ __forceinline__ void compute(const SmallArgs& args, std::uint32_t s_q, std::uint32_t s_k, int first_key,
                                          int row, int quad_lane, std::uint32_t full_v) {
    float s[kKeys / 2];
    const std::uint64_t q = ptx::descriptor(s_q, 16);
    const std::uint64_t k = ptx::descriptor(s_k, 16);
    ptx::keep(s);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step)
      ptx::Wgmma<kKeys, Element>::template shared<0>(s, q + step / 4 * (kSmallQueries * 128 >> 4) + step % 4 * 2,
                                                     k + step / 4 * (kKeys * 128 >> 4) + step % 4 * 2, step > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::keep(s);
    if (args.positional || first_key + kKeys > args.window.seqlen_k)
      tile::mask_by_position(s, args.window, first_key, row, quad_lane);
    soften(s, args.scale_log2);
    std::uint32_t p[kKeys / 4];
    tile::pack_weights<Element>(s, p);

    ptx::barrier_wait(full_v, 0);
    const std::uint64_t v = ptx::descriptor(s_k + Traits::kKBytes, kKeys * 128);
    ptx::keep(p);
    ptx::keep(o);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      ptx::Wgmma<kHeadDim, Element>::template registers<1>(o, p[4 * step], p[4 * step + 1], p[4 * step + 2],
                                                           p[4 * step + 3], v + step * (16 * 128 >> 4), 1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::keep(o);
  }

  /// Scores to weights; leaves exponent and sum.
  __device__ __forceinline__ void soften(float (&s)[kKeys / 2], float scale_log2) {
    constexpr int kChains = 4;  // of maxima and of sums, for each row: their latency is what counts
    float max[2 * kChains];
    float sums[2 * kChains] = {};
#pragma unroll
    for (float& x : max) x = -INFINITY;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) max[chain(i)] = fmaxf(max[chain(i)], s[i]);
    float offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float own = fmaxf(fmaxf(max[r], max[r + 2]), fmaxf(max[r + 4], max[r + 6]));
      exponent[r] = tile::quad_max(own) * scale_log2;
      offset[r] = exponent[r] == -INFINITY ? 0.0f : -exponent[r];
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      s[i] = ptx::ex2(fmaf(s[i], scale_log2, offset[i >> 1 & 1]));
      sums[chain(i)] += s[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = tile::quad_sum((sums[r] + sums[r + 2]) + (sums[r + 4] + sums[r + 6]));
      if (sum[r] != sum[r]) exponent[r] = 0.0f;  // a NaN hides from maxima: the row sees keys, and its sum tells of it
    }
  }
  /// Of accumulator i: its row, and every fourth group.
  static constexpr __device__ int chain(int i) { return (i >> 1 & 1) + 2 * (i >> 2 & 3); }

  __device__ __forceinline__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (float x : o) finite = finite && fabsf(x) < INFINITY;
    return finite;
  }

  /// Piece kPiece: of the thread's row kPiece % 2, the columns of half kPiece / 2.
  template <int kPiece>
  __device__ __forceinline__ void take(float2 (&piece)[kPairs]) const {
#pragma unroll
    for (int g = 0; g < kPairs; ++g) {
      const float* x = &o[kPiece / 2 * kHeadDim / 4 + 4 * g + kPiece % 2 * 2];
      piece[g] = make_float2(x[0], x[1]);
    }
  }

  /// `s_part`: the sender's, for the thread.
  template <int kPiece>
  __device__ __forceinline__ void send(float4* s_part) const {
    float2 piece[kPairs];
    take<kPiece>(piece);
#pragma unroll
    for (int i = 0; i < kPairs / 2; ++i)
      s_part[kPiece * kPieceBytes / 16 + i * 128] =
          make_float4(piece[2 * i].x, piece[2 * i].y, piece[2 * i + 1].x, piece[2 * i + 1].y);
  }
};

/// What the warpgroups know of a row together, with the sink's weight (unless the row sees no key). `sink`: an exponent
/// of 2, −inf where there is none.
__device__ __forceinline__ SmallStats merge_stats(const SmallStats (&parts)[kSmallParts], float sink) {
  SmallStats merged{-INFINITY, 0.0f};
#pragma unroll
  for (const SmallStats& part : parts) merged.exponent = fmaxf(merged.exponent, part.exponent);
  if (merged.exponent == -INFINITY) return merged;
  merged.exponent = fmaxf(merged.exponent, sink);
  merged.sum = ptx::ex2(sink - merged.exponent);
#pragma unroll
  for (const SmallStats& part : parts) merged.sum += part.sum * ptx::ex2(part.exponent - merged.exponent);
  return merged;
}

/// The warp's 16 rows again, touching only the keys that each sees. Seldom called: not to be inlined.
template <class Traits>
__device__ __noinline__ void redo_rows(const SmallArgs& args, int batch, int head, int first) {
  for (int i = first; i < min(first + 16, args.seqlen_q); ++i)
    tile::exact_row<typename Traits::Element, Traits::kHeadDim>(args.params, batch, head, i);
}

/// Grid: (query blocks, heads_q, batch). Threads: a warpgroup for each part of the keys, 1, 2 or 4.
template <class Traits>
__global__ void __launch_bounds__(128 * kSmallParts, 1)
    fwd_small(const __grid_constant__ SmallArgs args, const __grid_constant__ CUtensorMap map_q,
              const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v) {
  using Element = typename Traits::Element;
  using Part = SmallPart<Traits>;
  extern __shared__ unsigned char s_raw[];
  unsigned char* s_memory = s_raw + (-ptx::shared_address(s_raw) & 1023u);
  const int parts = static_cast<int>(blockDim.x) / 128;
  SmallShared& shared = *reinterpret_cast<SmallShared*>(s_memory + Traits::kQBytes + parts * Traits::kPartBytes);
  const int head = static_cast<int>(blockIdx.y);
  const int batch = static_cast<int>(blockIdx.z);
  const int first_row = static_cast<int>(blockIdx.x) * kSmallQueries;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int part = __shfl_sync(tile::kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int row_in_tile = warp * 16 + lane / 4;  // the thread's first; its second is 8 further
  const int row = first_row + row_in_tile;

  // Does some query of the tile see one of the part's keys?
  const int first_key = part * Traits::kKeys;
  const bool sees_keys = first_key < args.window.end(min(first_row + kSmallQueries, args.seqlen_q) - 1) &&
                         first_key + Traits::kKeys > args.window.begin(first_row);
  const std::uint32_t s_q = ptx::shared_address(s_memory);
  const std::uint32_t s_k = s_q + Traits::kQBytes + part * Traits::kPartBytes;
  const std::uint32_t full_q = ptx::shared_address(&shared.full_q);
  const std::uint32_t full_k = ptx::shared_address(&shared.full_k[part]);
  const std::uint32_t full_v = ptx::shared_address(&shared.full_v[part]);

  if (warp == 1 && lane < 3) ptx::prefetch_map(lane == 0 ? &map_k : lane == 1 ? &map_q : &map_v);
  if (thread == 0) {
    const auto load = [](const CUtensorMap* map, std::uint32_t s_target, std::uint32_t barrier, int rows, int row,
                         int head, int batch) {
      ptx::barrier_expect(barrier, Traits::kPanels * rows * 128);
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel)
        ptx::tma_load(s_target + panel * rows * 128, map, barrier, panel * 64, row, head, batch, ptx::kEvictLast);
    };
    if (part == 0) ptx::barrier_init(full_q, 1);
    ptx::barrier_init(full_k, 1);
    ptx::barrier_init(full_v, 1);
    ptx::fence_barrier_init();
    cuda::wait_for_previous_kernel();
    const int head_k = args.group == 1 ? head : head / args.group;
    if (sees_keys)
      load(&map_k, s_k, full_k, Traits::kKeys, first_key, head_k * args.k_head_step, batch * args.k_batch_step);
    if (part == 0)
      load(&map_q, s_q, full_q, kSmallQueries, first_row, head * args.q_head_step, batch * args.q_batch_step);
    if (sees_keys)
      load(&map_v, s_k + Traits::kKBytes, full_v, Traits::kKeys, first_key, head_k * args.v_head_step,
           batch * args.v_batch_step);
    cuda::let_next_kernel_start();
  }
  if (threadIdx.x < kSmallQueries / 16) shared.spoilt[threadIdx.x] = 0;
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

  Part own;
  const float sink =
      args.sinks.data ? detail::head_value<float>(args.sinks, batch, head, 0.0f) * tile::kLog2e : -INFINITY;
  ptx::barrier_wait(full_q, 0);  // also where no key is seen: a block must not end before its copies do
  if (sees_keys) {
    ptx::barrier_wait(full_k, 0);
    own.compute(args, s_q, s_k, first_key, row, lane % 4, full_v);
  }

  // 0 · NaN of a value that a row does not see has no place in its output.
  bool spoilt = args.positional && !__all_sync(tile::kAllLanes, own.is_finite());
  SmallStats known[2][kSmallParts];  // of the thread's rows, by part
#pragma unroll
  for (int i = 0; i < kSmallParts; ++i) known[0][i] = known[1][i] = {-INFINITY, 0.0f};
  if (parts == 1) {
    known[0][0] = {own.exponent[0], own.sum[0]};
    known[1][0] = {own.exponent[1], own.sum[1]};
  }
  const auto part_of = [&](int piece) { return parts == 4 ? piece : parts == 2 ? piece / 2 : 0; };
  // What a part sends lies in the place of its keys and values, by pieces, for each thread's counterparts.
  const auto s_sent = [&](int sender) {
    return reinterpret_cast<float4*>(s_memory + Traits::kQBytes + sender * Traits::kPartBytes) + thread;
  };
  if (parts > 1) {
    ptx::named_sync(1 + part, 128);  // all of its warps are done with the values
    if (lane % 4 == 0) {
      shared.stats[row_in_tile][part] = {own.exponent[0], own.sum[0]};
      shared.stats[row_in_tile + 8][part] = {own.exponent[1], own.sum[1]};
    }
    if (spoilt && lane == 0) shared.spoilt[warp] = 1;
    if (part_of(0) != part) own.template send<0>(s_sent(part));
    if (part_of(1) != part) own.template send<1>(s_sent(part));
    if (part_of(2) != part) own.template send<2>(s_sent(part));
    if (part_of(3) != part) own.template send<3>(s_sent(part));
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSmallParts; ++i) {
      if (i >= parts) break;
      known[0][i] = shared.stats[row_in_tile][i];
      known[1][i] = shared.stats[row_in_tile + 8][i];
    }
    spoilt = shared.spoilt[warp] != 0;
  }
  const SmallStats merged[2] = {merge_stats(known[0], sink), merge_stats(known[1], sink)};
  const auto factor = [&](float exponent, int r) {  // of what was weighted to that exponent
    if (merged[r].exponent == -INFINITY) return 0.0f;
    return __fdividef(ptx::ex2(exponent - merged[r].exponent), merged[r].sum);
  };
  const auto finish = [&](auto which) {
    constexpr int kPiece = decltype(which)::value;
    constexpr int r = kPiece % 2;
    constexpr int kFirstColumn = kPiece / 2 * Traits::kHeadDim / 2;
    if (part_of(kPiece) != part) return;
    float2 piece[Part::kPairs];
    own.template take<kPiece>(piece);
    const float scale = factor(own.exponent[r], r);
#pragma unroll
    for (float2& x : piece) x = make_float2(x.x * scale, x.y * scale);
#pragma unroll
    for (int other = 0; other < kSmallParts; ++other) {
      if (other >= parts || other == part) continue;
      const float scale = factor(known[r][other].exponent, r);
#pragma unroll
      for (int i = 0; i < Part::kPairs / 2; ++i) {
        const float4 y = s_sent(other)[kPiece * Part::kPieceBytes / 16 + i * 128];
        piece[2 * i] = make_float2(piece[2 * i].x + y.x * scale, piece[2 * i].y + y.y * scale);
        piece[2 * i + 1] = make_float2(piece[2 * i + 1].x + y.z * scale, piece[2 * i + 1].y + y.w * scale);
      }
    }
    tile::store_row<Element, true>(piece, out + r * next_row + kFirstColumn, row + 8 * r < args.seqlen_q && !spoilt,
                                   args.head_dim_v - kFirstColumn, lane % 4);
  };
  finish(std::integral_constant<int, 0>());
  finish(std::integral_constant<int, 1>());
  finish(std::integral_constant<int, 2>());
  finish(std::integral_constant<int, 3>());
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
