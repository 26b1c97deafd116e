// Hopper forward: warp-specialised FlashAttention with TMA and wgmma.
//
// A block has one producer warpgroup (one thread of it loads Q, K and V by TMA, a warp finds the next tile) and two or
// three consumer warpgroups of 64 query rows each. Blocks are persistent; tiles come as tile/scheduler.cuh says. Per
// tile, keys are taken from the last block to the first, so that masked blocks come first:
//
//   S = Q·K[n]ᵀ                        wgmma, both operands in shared memory, S in registers
//   P = 2^(S·c − m·c), m lazily         tile/softmax.cuh
//   for the other blocks:  issue S' = Q·K[n−1]ᵀ and O += P·V[n] together; soften S' while O is still computed
//   O += P·V[0];  O /= sum;  store, a warp at a time: by TMA where a buffer is left for that, else from registers
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

#include "../../cuda/launch.cuh"
#include "../common/repair.cuh"
#include "../ptx/barrier.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/warp.cuh"
#include "../ptx/wgmma.cuh"
#include "../semantics.h"
#include "../tile/mask.cuh"
#include "../tile/softmax.cuh"
#include "../tile/store.cuh"
#include "fwd_work.cuh"

namespace flashcore::sm90 {

/// One thread: loads Q, K and V of every tile of the block, as buffers fall free.
template <class Traits>
__device__ __forceinline__ void produce(const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v,
                                        const FwdArgs& args, std::uint32_t s_base) {
  using Plan = SharedPlan<Traits>;
  using KvRing = Ring<Traits::kStages>;
  using QRing = Ring<Traits::kQBuffers>;
  const auto load_panels = [](const CUtensorMap* map, std::uint32_t s_target, std::uint32_t barrier, int rows, int row,
                              int head, int batch, std::uint64_t hint) {
    for (int panel = 0; panel < Traits::kPanels; ++panel)
      ptx::tma_load(s_target + panel * rows * kPanelRowBytes, map, barrier, panel * kPanelColumns, row, head, batch,
                    hint);
  };
  int kv_use = 0;
  int q_use = 0;
  for (int n = 0;; ++n) {
    FwdPlace place;
    FwdLengths lengths;
    if constexpr (Traits::kEven) {
      place = even_place(args, n * gridDim.x + blockIdx.x);
      lengths = even_lengths(args);
    } else {
      const std::uint32_t s_slot = wait_for_tile<Traits>(s_base, n);
      place = load_place(s_slot);
      lengths = load_lengths(s_slot);
      release_tile<Traits>(s_base, n);
    }
    if (place.m_block < 0) break;
    const int head_k = place.head / args.group;
    const int row = place.m_block * Traits::kBlockM;
    const auto load_q = [&] {
      const int buffer = QRing::stage(q_use);
      const std::uint32_t full_q = s_base + Plan::kFullQ + 8 * buffer;
      ptx::barrier_wait(s_base + Plan::kEmptyQ + 8 * buffer, QRing::empty_parity(q_use));
      ptx::barrier_expect(full_q, Traits::kQBytes);
      load_panels(map_q, s_base + Plan::kQ + buffer * Traits::kQBytes, full_q, Traits::kBlockM, place.q_begin + row,
                  place.head * args.q_head_step, place.batch * args.q_batch_step, ptx::kEvictFirst);
      ++q_use;
    };
    const BlockRange blocks = key_blocks<Traits>(lengths.window(args), lengths.seqlen_q, row);
    if (blocks.begin >= blocks.end) load_q();
    for (int block = blocks.end - 1; block >= blocks.begin; --block, ++kv_use) {
      const int stage = KvRing::stage(kv_use);
      const int first_key = lengths.k_begin + block * Traits::kBlockN;
      const std::uint32_t full_k = s_base + Plan::kFullK + 8 * stage;
      const std::uint32_t full_v = s_base + Plan::kFullV + 8 * stage;
      ptx::barrier_wait(s_base + Plan::kEmptyK + 8 * stage, KvRing::empty_parity(kv_use));
      ptx::barrier_expect(full_k, Traits::kKBytes);
      load_panels(map_k, s_base + Plan::kK + stage * Traits::kKBytes, full_k, Traits::kBlockN, first_key,
                  head_k * args.k_head_step, place.batch * args.k_batch_step, ptx::kEvictLast);
      if (block == blocks.end - 1) load_q();  // after the first keys: with one query buffer it must not delay them
      ptx::barrier_wait(s_base + Plan::kEmptyV + 8 * stage, KvRing::empty_parity(kv_use));
      ptx::barrier_expect(full_v, Traits::kKBytes);
      load_panels(map_v, s_base + Plan::kV + stage * Traits::kKBytes, full_v, Traits::kBlockN, first_key,
                  head_k * args.v_head_step, place.batch * args.v_batch_step, ptx::kEvictLast);
    }
  }
}

/// Softcap, ALiBi, bias and mask on a block of scores: raw products in, scores in natural units out.
template <class Traits, int N>
__device__ __forceinline__ void general_scores(float (&s)[N], const FwdArgs& args, const FwdPlace& place,
                                               const FwdLengths& lengths, int first_key, int row, int quad_lane) {
  const int batch = place.batch;
  const int head = place.head;
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
    const int keys = i < lengths.seqlen_q ? lengths.seqlen_k - first : 0;  // of this row, from `first` on
    const std::int64_t bias_row = detail::plane_offset(p.bias, batch, head, i, first);
    const std::uint8_t* mask_row =
        static_cast<const std::uint8_t*>(p.mask.data) + detail::plane_offset(p.mask, batch, head, i, first);
    const float diagonal = static_cast<float>(i + lengths.shift_of_last() - first);
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

/// The share of one of the consumers' warps. Not to be inlined: at D256 there are no registers left for it.
template <class Traits>
__device__ __noinline__ void redo_spoilt_rows(const FwdArgs& args, int warp) {
  detail::redo_spoilt_rows<typename Traits::Element, Traits::kHeadDim>(args.params, args.spoilt, args.flags_per_head,
                                                                       warp, 4 * Traits::kConsumers);
}

/// A consumer warpgroup: its registers' meaning and the steps of the algorithm as verbs.
template <class Traits>
struct Consumer {
  using Element = typename Traits::Element;
  using Plan = SharedPlan<Traits>;
  using KvRing = Ring<Traits::kStages>;
  using QRing = Ring<Traits::kQBuffers>;
  static constexpr int kBlockM = Traits::kBlockM;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kFirstTurn = 1;  // named barriers kFirstTurn + consumer: whose turn to multiply it is
  static constexpr int kFirstOwn = 4;   // kFirstOwn + consumer: the warpgroup's own
  static constexpr int kAll = 7;        // of all consumers

  const FwdArgs& args;
  std::uint32_t s_base;
  int consumer;  // which warpgroup, from 0
  int thread;    // in the warpgroup
  int kv_use = 0;
  int q_use = 0;
  std::uint32_t s_work = 0;  // the tile at hand; even kernels: where it is
  FwdPlace even = {};
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
  /// One thread speaks for its warpgroup: no warp will wait for the buffer's fill or read it any more. Products see to
  /// that, which all four warps begin together; where there was none, sync_warpgroup() must.
  __device__ __forceinline__ void release(int barriers, int stage) const {
    if (thread == 0) ptx::barrier_arrive(s_base + barriers + 8 * stage);
  }
  __device__ __forceinline__ void sync_warpgroup() const { ptx::named_sync(kFirstOwn + consumer, kWarpgroup); }

  /// Lets blocks pass that only other consumers look at. `turns` of them are taken and given on, as those do.
  __device__ __forceinline__ void pass(int count, int turns) {
    for (; count > 0; --count, --turns, ++kv_use) {
      const int stage = KvRing::stage(kv_use);
      // Not released before all warps saw it full: a warp that comes two fills late would wait for ever.
      wait_full(Plan::kFullK, stage, KvRing::full_parity(kv_use));
      wait_full(Plan::kFullV, stage, KvRing::full_parity(kv_use));
      sync_warpgroup();
      release(Plan::kEmptyK, stage);
      release(Plan::kEmptyV, stage);
      if (turns <= 0) continue;
      take_turn();
      give_turn();
    }
  }

  /// S = Q·Kᵀ, queued, of the block's first kKeys keys. Both tiles lie in panels of 64 columns; a step of 16 columns is
  /// 32 bytes in a panel's row.
  template <int kKeys = kBlockN>
  __device__ __forceinline__ void issue_scores(float (&s)[kKeys / 2], int q_buffer, int stage) const {
    const std::uint64_t q = ptx::descriptor(
        s_base + Plan::kQ + q_buffer * Traits::kQBytes + consumer * kRowsPerConsumer * kPanelRowBytes, 16);
    const std::uint64_t k = ptx::descriptor(s_base + Plan::kK + stage * Traits::kKBytes, 16);
    ptx::keep(s);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step)
      ptx::Wgmma<kKeys, Element>::template shared<0>(s, q + step / 4 * (kBlockM * kPanelRowBytes >> 4) + step % 4 * 2,
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
  template <int N>
  __device__ __forceinline__ void look_for_keys(const float (&s)[N]) {
    if (!args.params.sinks.data) return;
#pragma unroll
    for (int i = 0; i < N; ++i) seen |= s[i] == -INFINITY ? 0u : 1u << (i >> 1 & 1);
  }

  /// Whether row r (0 or 1) of the thread saw no key at all: such a row is empty, whatever its sink. By all lanes.
  __device__ __forceinline__ bool is_empty(int row, int r) const {
    if (!args.params.sinks.data) return false;  // the sum tells
    if (Traits::kGeneral) return tile::quad_max(seen >> r & 1 ? 1.0f : 0.0f) == 0.0f;
    return window().begin(row + 8 * r) >= window().end(row + 8 * r);
  }

  __device__ __forceinline__ FwdPlace place() const { return Traits::kEven ? even : load_place(s_work); }
  __device__ __forceinline__ FwdLengths lengths() const {
    return Traits::kEven ? even_lengths(args) : load_lengths(s_work);
  }
  __device__ __forceinline__ tile::KeyWindow window() const { return lengths().window(args); }

  /// Everything between the raw products and the weights of a block's first keys.
  template <int N>
  __device__ __forceinline__ void soften(float (&s)[N], tile::OnlineSoftmax& softmax, int row, int block, bool masked) {
    const int first_key = block * kBlockN;
    if constexpr (Traits::kGeneral) general_scores<Traits>(s, args, place(), lengths(), first_key, row, quad_lane());
    if (masked) tile::mask_by_position(s, window(), first_key, row, quad_lane());
    softmax.take_max(s, args.scale_log2, args.threshold);
    if constexpr (Traits::kGeneral) look_for_keys(s);
    softmax.exponentiate(s, args.scale_log2);
  }

  /// Rows to global memory, each warp its own 16. `row`: the thread's, in its sequence.
  __device__ __forceinline__ void store(const CUtensorMap* map_out, const float (&o)[kHeadDim / 2], int row) const {
    // The rows behind a packed sequence belong to the next, so that its last ones cannot be stored as a box. The vote
    // tells the compiler that all lanes agree: else it would keep the products' addresses in registers of each lane
    // from here on (100 instructions a block).
    const bool ends =
        !Traits::kEven && args.packed && __any_sync(tile::kAllLanes, row - (lane() >> 2) + 16 > lengths().seqlen_q);
    if (Traits::kTile.separate_out && !ends) {
      store_staged(map_out, o, row);
    } else {
      store_directly(o, row);
    }
  }

  /// Through shared memory and the copy engine.
  __device__ __forceinline__ void store_staged(const CUtensorMap* map_out, const float (&o)[kHeadDim / 2],
                                               int row) const {
    const std::uint32_t s_out = s_base + Plan::kOut + (consumer * kRowsPerConsumer + warp() * 16) * kPanelRowBytes;
    ptx::bulk_wait_read<0>();  // the last tile's store has read the buffer
    __syncwarp();
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
    const FwdPlace place = this->place();
    const int batch = !Traits::kEven && args.packed ? 0 : place.batch;
    const int first = row - (lane() >> 2);  // the warp's
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel)
      ptx::tma_store(map_out, s_out + panel * kBlockM * kPanelRowBytes, panel * kPanelColumns, place.q_begin + first,
                     place.head, batch);
    ptx::bulk_commit();
  }

  /// From registers: slower than the copy engine, but no shared memory is taken from the next tile's queries.
  __device__ __forceinline__ void store_directly(const float (&o)[kHeadDim / 2], int row) const {
    const detail::TensorParams& out = args.params.out;
    const FwdPlace place = this->place();
    const int seqlen_q = lengths().seqlen_q;
    Element* const target = static_cast<Element*>(out.data) + (args.packed ? 0 : place.batch * out.batch) +
                            place.head * out.head + (place.q_begin + row) * out.seq;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2 pairs[kHeadDim / 8];
      tile::pairs_of_row(o, r, pairs);
      tile::store_row<Element, kHeadDim <= 128>(pairs, target + 8 * r * out.seq, row + 8 * r < seqlen_q,
                                                args.params.size.head_dim_v, quad_lane());
    }
  }

  __device__ __forceinline__ void store_lse(const tile::OnlineSoftmax& softmax, int row) const {
    const detail::RowParams& lse = args.params.lse;
    if (!lse.data) return;
    const FwdPlace place = this->place();
    const int seqlen_q = lengths().seqlen_q;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float value = is_empty(row, r) ? -INFINITY : softmax.lse(r, args.scale_log2);
      if (quad_lane() == 0 && row + 8 * r < seqlen_q)
        static_cast<float*>(
            lse.data)[place.batch * lse.batch + place.head * lse.head + (place.q_begin + row + 8 * r) * lse.seq] =
            value;
    }
  }

  /// Leaves word for finish_block whether excluded keys may have spoilt the warp's 16 rows.
  __device__ __forceinline__ void flag_spoilt(const float (&o)[kHeadDim / 2]) const {
    if constexpr (Traits::kEven) return;
    // A sum is finite only if all its terms are. Should it overflow by itself, the rows are done again for nothing.
    constexpr int kChains = 8;
    float sums[kChains] = {};
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) sums[i % kChains] += o[i];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kChains; ++i) sum += sums[i];
    const bool spoilt = !__all_sync(tile::kAllLanes, fabsf(sum) < INFINITY);
    const FwdPlace place = this->place();
    const int first = place.m_block * kBlockM + consumer * kRowsPerConsumer + warp() * 16;
    if (lane() == 0 && first < lengths().seqlen_q) {
      args.spoilt[detail::spoilt_flag(args.packed, args.flags_per_head, args.heads_q, place.batch, place.head,
                                      place.q_begin, first)] = spoilt;
      if (spoilt) {
        *args.any_spoilt = args.counter.tag;
        ptx::store_shared(s_base + Plan::kSpoilt, 1);
      }
    }
  }

  /// After the last tile. The last block of all does spoilt rows again: all flags, and what was stored over flagged
  /// rows, can be seen by then.
  __device__ __forceinline__ void finish_block() const {
    ptx::bulk_wait_read<0>();  // shared memory must outlive the stores that read it
    if (ptx::load_shared(s_base + Plan::kSpoilt)) ptx::bulk_wait<0>();
    __threadfence();
    ptx::named_sync(kAll, Traits::kConsumers * kWarpgroup);
    const bool last = consumer == 0 && thread == 0 && args.counter.leave(gridDim.x);
    if (!ptx::named_any(kAll, Traits::kConsumers * kWarpgroup, last)) return;
    __threadfence();
    if (*static_cast<volatile unsigned*>(args.any_spoilt) == args.counter.tag)
      redo_spoilt_rows<Traits>(args, 4 * consumer + warp());
  }

  __device__ __forceinline__ void run_tile(const CUtensorMap* map_out);
};

template <class Traits>
__device__ __forceinline__ void Consumer<Traits>::run_tile(const CUtensorMap* map_out) {
  const int first_row = place().m_block * kBlockM;
  const int row = first_row + row_in_tile();
  const int top = first_row + consumer * kRowsPerConsumer;
  const FwdLengths length = lengths();
  const BlockRange all = key_blocks<Traits>(length.window(args), length.seqlen_q, first_row);
  const BlockRange blocks = own_blocks<Traits>(length.window(args), length.seqlen_q, all, top);
  const BlockRange whole = whole_blocks<Traits>(length.window(args), top);
  const int buffer = QRing::stage(q_use);

  float o[kHeadDim / 2];
  float s[kBlockN / 2];
  std::uint32_t p[kBlockN / 4];
  tile::OnlineSoftmax softmax;
  seen = 0;
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
  if (args.params.sinks.data)
    softmax.start_with(detail::head_value<float>(args.params.sinks, place().batch, place().head, 0.0f) * tile::kLog2e /
                           args.scale_log2,
                       args.scale_log2, quad_lane() == 0);

  wait_full(Plan::kFullQ, buffer, QRing::full_parity(q_use));
  ++q_use;
  if (all.begin < all.end) {
    // Every consumer takes one turn less than the tile has blocks.
    const int before = blocks.begin < blocks.end ? all.end - blocks.end : all.end - all.begin;
    pass(before, blocks.begin < blocks.end ? before : before - 1);
  }
  if (blocks.begin < blocks.end) {
    const int first = blocks.end - 1;
    const int keys = KvRing::stage(kv_use);
    wait_full(Plan::kFullK, keys, KvRing::full_parity(kv_use));
    const auto start = [&](auto& scores) {
      issue_scores<2 * sizeof scores / sizeof scores[0]>(scores, buffer, keys);
      ptx::wgmma_wait<0>();
      ptx::keep(scores);
      release(Plan::kEmptyK, keys);
      soften(scores, softmax, row, first, first < whole.begin || first >= whole.end);
    };
    // On the diagonal every second consumer sees only the first half of the keys.
    bool half = false;
    if constexpr (Traits::kHalfFirst) {
      half = window().end(top + kRowsPerConsumer - 1) <= first * kBlockN + kBlockN / 2;
      if (half) {
        start(reinterpret_cast<float (&)[kBlockN / 4]>(s));
#pragma unroll
        for (int i = kBlockN / 4; i < kBlockN / 2; ++i) s[i] = 0.0f;
      }
    }
    if (!half) start(s);
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
      soften(s, softmax, row, block, block < whole.begin || block >= whole.end);
      ptx::wgmma_wait<0>();
      ptx::keep(o);
      release(Plan::kEmptyV, values);
      tile::pack_weights<Element>(s, p);  // not before the wait: ptxas would serialise the products (C7513)
      if (!Traits::kTile.rescale_early && softmax.moved) softmax.rescale(o);
    }
    if (Traits::kTile.rescale_early && softmax.moved) softmax.rescale(o);
    release(Plan::kEmptyQ, buffer);  // its last product has been waited for
    const int values = KvRing::stage(kv_use);
    wait_full(Plan::kFullV, values, KvRing::full_parity(kv_use));
    issue_values(o, p, values);
    ptx::wgmma_wait<0>();
    ptx::keep(o);
    release(Plan::kEmptyV, values);
    ++kv_use;
    if (!Traits::kEven) pass(blocks.begin - all.begin, blocks.begin - all.begin);
  } else {
    sync_warpgroup();
    release(Plan::kEmptyQ, buffer);
  }

  flag_spoilt(o);
  const float inverse[2] = {softmax.finish(0), softmax.finish(1)};
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= inverse[i >> 1 & 1];
  store(map_out, o, row);
  store_lse(softmax, row);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kTile.threads(), 1)
    fwd(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
        const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_out,
        const __grid_constant__ FwdArgs args) {
  using Plan = SharedPlan<Traits>;
  extern __shared__ __align__(1024) unsigned char s_memory[];
  const std::uint32_t s_base = ptx::shared_address(s_memory);
  for (const CUtensorMap* map : {&map_q, &map_k, &map_v, &map_out})
    if (threadIdx.x == kWarpgroup) ptx::prefetch_map(map);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kQBuffers; ++i) {
      ptx::barrier_init(s_base + Plan::kFullQ + 8 * i, 1);
      ptx::barrier_init(s_base + Plan::kEmptyQ + 8 * i, Traits::kConsumers);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::barrier_init(s_base + Plan::kFullK + 8 * i, 1);
      ptx::barrier_init(s_base + Plan::kFullV + 8 * i, 1);
      ptx::barrier_init(s_base + Plan::kEmptyK + 8 * i, Traits::kConsumers);
      ptx::barrier_init(s_base + Plan::kEmptyV + 8 * i, Traits::kConsumers);
    }
    for (int i = 0; i < kTileSlots; ++i) {
      ptx::barrier_init(s_base + Plan::kFullTile + 8 * i, 1);
      ptx::barrier_init(s_base + Plan::kEmptyTile + 8 * i,
                        Traits::kConsumers * 4 + 1);  // every warp, and the loading thread
    }
    ptx::store_shared(s_base + Plan::kSpoilt, 0);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  cuda::wait_for_previous_kernel();
  cuda::let_next_kernel_start();

  const int warpgroup = __shfl_sync(tile::kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Traits::kTile.producer_registers>();
    const int warp = __shfl_sync(tile::kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 0 && ptx::elect()) produce<Traits>(&map_q, &map_k, &map_v, args, s_base);
    if (!Traits::kEven && warp == 1) schedule<Traits>(args, s_base);
    if (!Traits::kEven && warp == 2 && args.packed) clear_unowned_rows<typename Traits::Element>(args.params);
  } else {
    ptx::take_registers<Traits::kTile.consumer_registers>();
    Consumer<Traits> self{args, s_base, warpgroup - 1, static_cast<int>(threadIdx.x) % kWarpgroup};
    if (self.consumer == 0) ptx::named_arrive(Consumer<Traits>::kFirstTurn, 2 * kWarpgroup);  // the first turn is given
#pragma unroll 1
    for (int n = 0;; ++n) {
      if constexpr (Traits::kEven) {
        self.even = even_place(args, n * gridDim.x + blockIdx.x);
      } else {
        self.s_work = wait_for_tile<Traits>(s_base, n);
      }
      if (self.place().m_block < 0) break;
      self.run_tile(&map_out);
      if (Traits::kEven) continue;
      __syncwarp();
      if (self.lane() == 0) release_tile<Traits>(s_base, n);
    }
    if constexpr (Traits::kEven)
      ptx::bulk_wait_read<0>();
    else
      self.finish_block();
  }
}

}  // namespace flashcore::sm90
