// Hopper forward for problems that leave most of the chip idle: one block for 64 queries of a head, no loop.
//
// All keys and values lie in shared memory at once, a part for each of up to four warpgroups, and all copies are queued
// at the start. The warpgroups share the queries:
//
//   S = Q·Kᵀ, softmax, O = P·V     each for its own keys, with its own maximum, as soon as they have come
//   merge                          outputs scaled to the common maximum and sum meet in shared memory
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
#include "tiles.h"

namespace flashcore::sm90 {

/// kHeadDim: the bucket, 64 or 128. kKeys: of one warpgroup.
template <class Element_, int kHeadDim_, int kKeys_>
struct SmallTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kQueries = kSmallQueries;
  static constexpr int kPanels = kHeadDim / 64;  // of 128 bytes a row, swizzled
  static constexpr int kQBytes = kPanels * kQueries * 128;
  static constexpr int kKBytes = kPanels * kKeys * 128;
  static constexpr int kOutBytes = kQueries * kHeadDim * 4;  // of a warpgroup's output, in its keys' and values' place
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
      ptx::Wgmma<kKeys, Element>::template shared<0>(s, q + step / 4 * (Traits::kQueries * 128 >> 4) + step % 4 * 2,
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
    float max[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) max[i >> 1 & 1] = fmaxf(max[i >> 1 & 1], s[i]);
    float offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      exponent[r] = tile::quad_max(max[r]) * scale_log2;
      offset[r] = exponent[r] == -INFINITY ? 0.0f : -exponent[r];
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      s[i] = ptx::ex2(fmaf(s[i], scale_log2, offset[i >> 1 & 1]));
      sum[i >> 1 & 1] += s[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = tile::quad_sum(sum[r]);
      if (sum[r] != sum[r]) exponent[r] = 0.0f;  // a NaN hides from maxima: the row sees keys, and its sum tells of it
    }
  }

  __device__ __forceinline__ void scale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= factor[i >> 1 & 1];
  }

  __device__ __forceinline__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (float x : o) finite = finite && fabsf(x) < INFINITY;
    return finite;
  }
};

/// The sink's weight joins a row's sum, unless the row sees no key. `sink`: an exponent of 2, −inf where there is none.
__device__ __forceinline__ SmallStats with_sink(SmallStats row, float sink) {
  if (row.exponent == -INFINITY || sink == -INFINITY) return row;
  const float exponent = fmaxf(row.exponent, sink);
  return {exponent, row.sum * ptx::ex2(row.exponent - exponent) + ptx::ex2(sink - exponent)};
}

/// What all warpgroups know of a row together.
__device__ __forceinline__ SmallStats merge_stats(const SmallStats (&s_parts)[kSmallParts]) {
  SmallStats parts[kSmallParts];
  SmallStats merged{-INFINITY, 0.0f};
#pragma unroll
  for (int i = 0; i < kSmallParts; ++i) {
    parts[i] = s_parts[i];
    merged.exponent = fmaxf(merged.exponent, parts[i].exponent);
  }
  if (merged.exponent == -INFINITY) return merged;
#pragma unroll
  for (int i = 0; i < kSmallParts; ++i) merged.sum += parts[i].sum * ptx::ex2(parts[i].exponent - merged.exponent);
  return merged;
}

/// The warp's 16 rows again, touching only the keys that each sees. Seldom called: not to be inlined.
template <class Traits>
__device__ __noinline__ void redo_rows(const SmallArgs& args, int batch, int head, int first) {
  for (int i = first; i < min(first + 16, args.seqlen_q); ++i)
    tile::exact_row<typename Traits::Element, Traits::kHeadDim>(args.params, batch, head, i);
}

/// Two neighbouring columns of a row, of which `columns` exist.
template <class Element>
__device__ __forceinline__ void store_pair(Element* target, float low, float high, int columns) {
  if (columns > 1)
    *reinterpret_cast<std::uint32_t*>(target) = ptx::pack<Element>(low, high);
  else if (columns > 0)
    detail::store(*target, low);
}

/// Grid: (query blocks, heads_q, batch). Threads: a warpgroup for each part of the keys.
template <class Traits>
__global__ void __launch_bounds__(128 * kSmallParts, 1)
    fwd_small(const __grid_constant__ SmallArgs args, const __grid_constant__ CUtensorMap map_q,
              const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v) {
  using Element = typename Traits::Element;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kQueries = Traits::kQueries;
  constexpr int kGroups = kHeadDim / 8;  // of four accumulators: two neighbouring columns of the thread's two rows
  extern __shared__ unsigned char s_raw[];
  unsigned char* s_memory = s_raw + (-ptx::shared_address(s_raw) & 1023u);
  const int parts = static_cast<int>(blockDim.x) / 128;
  SmallShared& shared = *reinterpret_cast<SmallShared*>(s_memory + Traits::kQBytes + parts * Traits::kPartBytes);
  const int head = static_cast<int>(blockIdx.y);
  const int batch = static_cast<int>(blockIdx.z);
  const int first_row = static_cast<int>(blockIdx.x) * kQueries;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int part = __shfl_sync(tile::kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int row_in_tile = warp * 16 + lane / 4;  // the thread's first; its second is 8 further
  const int row = first_row + row_in_tile;

  // Does some query of the tile see one of the part's keys?
  const int first_key = part * Traits::kKeys;
  const bool sees_keys = first_key < args.window.end(min(first_row + kQueries, args.seqlen_q) - 1) &&
                         first_key + Traits::kKeys > args.window.begin(first_row);
  const std::uint32_t s_q = ptx::shared_address(s_memory);
  const std::uint32_t s_k = s_q + Traits::kQBytes + part * Traits::kPartBytes;
  const std::uint32_t full_q = ptx::shared_address(&shared.full_q);
  const std::uint32_t full_k = ptx::shared_address(&shared.full_k[part]);
  const std::uint32_t full_v = ptx::shared_address(&shared.full_v[part]);

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
    if (part == 0) load(&map_q, s_q, full_q, kQueries, first_row, head * args.q_head_step, batch * args.q_batch_step);
    if (sees_keys)
      load(&map_v, s_k + Traits::kKBytes, full_v, Traits::kKeys, first_key, head_k * args.v_head_step,
           batch * args.v_batch_step);
  }
  for (int i = static_cast<int>(threadIdx.x); i < kQueries * kSmallParts; i += static_cast<int>(blockDim.x))
    shared.stats[i / kSmallParts][i % kSmallParts] = {-INFINITY, 0.0f};
  if (threadIdx.x < kQueries / 16) shared.spoilt[threadIdx.x] = 0;
  Element* out = static_cast<Element*>(args.out.data) + batch * args.out.batch + head * args.out.head +
                 row * args.out.seq + 2 * (lane % 4);
  __syncthreads();

  SmallPart<Traits> own;
  ptx::barrier_wait(full_q, 0);  // also where no key is seen: a block must not end before its copies do
  if (sees_keys) {
    ptx::barrier_wait(full_k, 0);
    own.compute(args, s_q, s_k, first_key, row, lane % 4, full_v);
  }
  const float sink =
      args.sinks.data ? detail::head_value<float>(args.sinks, batch, head, 0.0f) * tile::kLog2e : -INFINITY;
  // 0 · NaN of a value that a row does not see has no place in its output.
  bool spoilt = args.positional && !__all_sync(tile::kAllLanes, own.is_finite());
  SmallStats merged[2] = {{own.exponent[0], own.sum[0]}, {own.exponent[1], own.sum[1]}};
  if (parts > 1) {
    if (lane % 4 == 0) {
      shared.stats[row_in_tile][part] = merged[0];
      shared.stats[row_in_tile + 8][part] = merged[1];
    }
    if (spoilt && lane == 0) shared.spoilt[warp] = 1;
    __syncthreads();
    merged[0] = merge_stats(shared.stats[row_in_tile]);
    merged[1] = merge_stats(shared.stats[row_in_tile + 8]);
    spoilt = shared.spoilt[warp] != 0;
  }
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    merged[r] = with_sink(merged[r], sink);
    factor[r] = merged[r].exponent == -INFINITY
                    ? 0.0f
                    : __fdividef(ptx::ex2(own.exponent[r] - merged[r].exponent), merged[r].sum);
  }
  own.scale(factor);
  const auto store = [&](int group, const float4& x) {
    const int columns = args.head_dim_v - 8 * group - 2 * (lane % 4);
    if (row < args.seqlen_q) store_pair(out + 8 * group, x.x, x.y, columns);
    if (row + 8 < args.seqlen_q) store_pair(out + 8 * group + 8 * args.out.seq, x.z, x.w, columns);
  };
  const auto own_group = [&](int group) {
    return make_float4(own.o[4 * group], own.o[4 * group + 1], own.o[4 * group + 2], own.o[4 * group + 3]);
  };
  if (parts == 1) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      if (!spoilt) store(group, own_group(group));
  } else {
    // Parts meet as [part][group][thread]. Each warpgroup sums and stores every parts-th group.
    float4* s_groups = reinterpret_cast<float4*>(s_memory + Traits::kQBytes) + thread;
    constexpr int kPartStep = Traits::kPartBytes / 16;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) s_groups[part * kPartStep + group * 128] = own_group(group);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kGroups / 2; ++i) {
      const int group = part + i * parts;
      if (group >= kGroups || spoilt) break;
      float4 x = s_groups[group * 128];
#pragma unroll
      for (int other = 1; other < kSmallParts; ++other) {
        if (other >= parts) break;
        const float4 y = s_groups[other * kPartStep + group * 128];
        x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
      }
      store(group, x);
    }
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
