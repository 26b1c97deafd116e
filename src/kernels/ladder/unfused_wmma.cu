// The first rung: attention as it is written on the blackboard, one kernel for each line.
//
//   S   = Q · Kᵀ              scores_kernel     tensor cores; S to memory in float32
//   P   = softmax(scale · S)  softmax_kernel    one warp a row; P to memory in 16 bits
//   out = P · V               values_kernel     tensor cores
//
// Both matrix products are the tiled product of every textbook: a block stages what its warps share in shared memory,
// each warp multiplies 16×16 tiles. S and P have seqlen_q × seqlen_k elements a head, so memory, not the tensor cores,
// sets the pace: this rung is here to be measured against the next one, which never writes them.
//
// S and P are padded to whole tiles, so only q, k, v and out have ragged edges. They may be larger than memory: heads
// are done as many at a time as fit in a fixed amount.
#include <algorithm>

#include "../../cuda/launch.cuh"
#include "../common/repair.h"
#include "ladder.h"
#include "tile.cuh"

namespace flashcore::ladder {
namespace {

constexpr int kTile = 64;                                  // rows, and keys, of a block
constexpr int kSlice = 32;                                 // of the summed dimension: what is staged at once
constexpr int kThreads = kTile / kSide * tile::kWarpSize;  // a warp for each strip of 16 rows
constexpr int kTilesOfSide = kTile / kSide;
constexpr std::int64_t kMostBytes = std::int64_t{1} << 30;  // of S and P together, unless one head needs more

/// S and P of some heads: [head][row][key], rows and keys padded to whole tiles.
struct Scratch {
  int heads;  // at once
  int rows;
  int keys;
  int first_head;
  float* score;
  void* weight;  // of q's dtype

  std::int64_t elements() const { return std::int64_t{heads} * rows * keys; }
  /// The row of S, or of P, of query `row` of the head `head` places after first_head.
  template <class T>
  __device__ T* row_of(T* plane, int head, int row) const {
    return plane + (std::int64_t{head} * rows + row) * keys;
  }
};

int padded(std::int64_t size) { return static_cast<int>((size + kTile - 1) / kTile * kTile); }

Scratch scratch_for(const detail::Sizes& size) {
  constexpr std::int64_t kBytes = sizeof(float) + sizeof(detail::Float16);
  Scratch w{};
  w.rows = padded(size.seqlen_q);
  w.keys = padded(size.seqlen_k);
  const std::int64_t one_head = std::max<std::int64_t>(std::int64_t{w.rows} * w.keys * kBytes, 1);
  const std::int64_t fitting = std::max<std::int64_t>(kMostBytes / one_head, 1);
  w.heads = static_cast<int>(std::min(size.batch * size.heads_q, fitting));
  return w;
}

/// A stored row is read up to here by who computes its tile of rows; S beyond is never written.
__device__ int keys_of_row(const Params& p, int row) {
  return (tile_end(p, row / kTile * kTile, kTile) + kSlice - 1) / kSlice * kSlice;
}

// ---- S = Q · Kᵀ -----------------------------------------------------------------------------------------------------

/// One tile of S. A warp makes 16 rows of it.
template <class T>
__global__ void __launch_bounds__(kThreads) scores_kernel(const __grid_constant__ Params p, const Scratch w) {
  if constexpr (kHasBody<T>) {
    constexpr int kPitch = kSlice + Vector<T>::kSize;  // neighbouring rows in other banks
    alignas(kAlignment) __shared__ T s_q[kTile][kPitch];
    alignas(kAlignment) __shared__ T s_k[kTile][kPitch];
    const int n_blocks = w.keys / kTile;
    const int m_blocks = w.rows / kTile;
    const int block = static_cast<int>(blockIdx.x);
    const int first_key = block % n_blocks * kTile;
    const int first_row = block / n_blocks % m_blocks * kTile;
    const int local_head = block / n_blocks / m_blocks;
    if (first_key >= tile_end(p, first_row, kTile)) return;  // the causal rule excludes it all

    const Head head = head_of(p, w.first_head + local_head);
    const T* q = rows_of<const T>(p.q, head.batch, head.q);
    const T* k = rows_of<const T>(p.k, head.batch, head.k);
    const int strip = static_cast<int>(threadIdx.x) / tile::kWarpSize * kSide;
    Sums score[kTilesOfSide];
    for (Sums& tile : score) wmma::fill_fragment(tile, 0.0f);
    for (int column = 0; column < p.size.head_dim; column += kSlice) {
      __syncthreads();  // the slice before is no longer needed
      stage_rows<kThreads, kSlice>(s_q, q + column, p.q.seq, first_row, static_cast<int>(p.size.seqlen_q));
      stage_rows<kThreads, kSlice>(s_k, k + column, p.k.seq, first_key, static_cast<int>(p.size.seqlen_k));
      __syncthreads();  // the slices are there
#pragma unroll
      for (int d = 0; d < kSlice; d += kSide) {
        Left<T> left;
        load_tile(left, &s_q[strip][d], kPitch);
#pragma unroll
        for (int n = 0; n < kTilesOfSide; ++n) {
          RightTransposed<T> right;
          load_tile(right, &s_k[n * kSide][d], kPitch);
          wmma::mma_sync(score[n], left, right, score[n]);
        }
      }
    }
    float* rows = w.row_of(w.score, local_head, first_row + strip) + first_key;
    for (int n = 0; n < kTilesOfSide; ++n)
      wmma::store_matrix_sync(rows + n * kSide, score[n], static_cast<unsigned>(w.keys), wmma::mem_row_major);
  }
}

// ---- P = softmax(scale · S) -----------------------------------------------------------------------------------------

/// One row, by one warp, in three passes: the maximum, the sum, the weights. Exponentials are powers of 2.
template <class T>
__device__ void soften_row(const Params& p, const float* score, T* weight, int end, int padded_end, float* lse) {
  const int lane = static_cast<int>(threadIdx.x) % tile::kWarpSize;
  const float scale_log2 = static_cast<float>(p.score.scale * 1.4426950408889634);
  float max = -INFINITY;
  for (int j = lane; j < end; j += tile::kWarpSize) max = tile::Max::combine(max, score[j] * scale_log2);
  max = tile::warp_reduce<tile::Max>(max);
  const bool empty = max == -INFINITY;  // it sees no key: all weights are 0
  const float origin = empty ? 0.0f : max;

  float sum = 0;
  for (int j = lane; j < end; j += tile::kWarpSize) sum += exp2f(score[j] * scale_log2 - origin);
  sum = tile::warp_reduce<tile::Sum>(sum);

  const float factor = empty ? 0.0f : 1.0f / sum;
  for (int j = lane; j < padded_end; j += tile::kWarpSize)
    detail::store(weight[j], j < end ? exp2f(score[j] * scale_log2 - origin) * factor : 0.0f);
  if (lse && lane == 0) *lse = empty ? -INFINITY : (max + log2f(sum)) * tile::kLn2;
}

template <class T>
__global__ void __launch_bounds__(kThreads) softmax_kernel(const __grid_constant__ Params p, const Scratch w) {
  constexpr int kWarps = kThreads / tile::kWarpSize;
  const int seqlen_q = static_cast<int>(p.size.seqlen_q);
  const int blocks_of_head = (seqlen_q + kWarps - 1) / kWarps;
  const int local_head = static_cast<int>(blockIdx.x) / blocks_of_head;
  const int row = static_cast<int>(blockIdx.x) % blocks_of_head * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (row >= seqlen_q) return;
  const Head head = head_of(p, w.first_head + local_head);
  float* lse = static_cast<float*>(p.lse.data);
  if (lse) lse += head.batch * p.lse.batch + head.q * p.lse.head + row * p.lse.seq;
  soften_row(p, w.row_of(w.score, local_head, row), w.row_of(static_cast<T*>(w.weight), local_head, row),
             visible_end(p, row), keys_of_row(p, row), lse);
}

// ---- out = P · V ----------------------------------------------------------------------------------------------------

/// 64 rows of the output, all columns. A warp makes 16 rows; the warps share the values.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    values_kernel(const __grid_constant__ Params p, const Scratch w, std::uint8_t* spoilt) {
  if constexpr (kHasBody<T>) {
    constexpr int kPitch = kHeadDim + Vector<T>::kSize;
    union Storage {
      alignas(kAlignment) T v[kSlice][kPitch];
      alignas(kAlignment) float out[kTile][kHeadDim + Vector<float>::kSize];  // once the values are no longer needed
    };
    __shared__ Storage s;
    __shared__ int s_spoilt[kTilesOfSide];
    const int m_blocks = w.rows / kTile;
    const int m_block = static_cast<int>(blockIdx.x) % m_blocks;
    const int local_head = static_cast<int>(blockIdx.x) / m_blocks;
    const int first_row = m_block * kTile;
    const Head head = head_of(p, w.first_head + local_head);
    const T* v = rows_of<const T>(p.v, head.batch, head.k);
    const int strip = static_cast<int>(threadIdx.x) / tile::kWarpSize * kSide;
    const T* weight = w.row_of(static_cast<const T*>(w.weight), local_head, first_row + strip);
    if (threadIdx.x < kTilesOfSide) s_spoilt[threadIdx.x] = 0;

    Sums out[kHeadDim / kSide];
    for (Sums& tile : out) wmma::fill_fragment(tile, 0.0f);
    const int keys = keys_of_row(p, first_row);
    for (int first_key = 0; first_key < keys; first_key += kSlice) {
      __syncthreads();  // the slice before is no longer needed
      stage_rows<kThreads, kHeadDim>(s.v, v, p.v.seq, first_key, static_cast<int>(p.size.seqlen_k));
      __syncthreads();  // the slice is there
#pragma unroll
      for (int n = 0; n < kSlice; n += kSide) {
        Left<T> left;  // straight from memory: no other warp needs it
        load_tile(left, weight + first_key + n, w.keys);
#pragma unroll
        for (int c = 0; c < kHeadDim / kSide; ++c) {
          Right<T> right;
          load_tile(right, &s.v[n][c * kSide], kPitch);
          wmma::mma_sync(out[c], left, right, out[c]);
        }
      }
    }
    __syncthreads();  // the values are no longer needed
    constexpr int kOutPitch = kHeadDim + Vector<float>::kSize;
    for (int c = 0; c < kHeadDim / kSide; ++c)
      wmma::store_matrix_sync(&s.out[strip][c * kSide], out[c], kOutPitch, wmma::mem_row_major);
    __syncthreads();  // the output is whole
    store_rows<kThreads, kHeadDim>(s.out, rows_of<T>(p.out, head.batch, head.q), p.out.seq, first_row,
                                   static_cast<int>(p.size.seqlen_q), s_spoilt);
    if (!spoilt) return;
    __syncthreads();  // all rows were looked at
    if (threadIdx.x >= kTilesOfSide) return;
    const std::int64_t tile = std::int64_t{w.first_head + local_head} * m_blocks + m_block;
    spoilt[tile * kTilesOfSide + threadIdx.x] = static_cast<std::uint8_t>(s_spoilt[threadIdx.x]);
  }
}

// ---- the three in a row ---------------------------------------------------------------------------------------------

template <class T>
void launch_values(const Params& p, const Scratch& w, std::uint8_t* spoilt, Stream stream) {
  const auto kernel = p.size.head_dim == 32   ? values_kernel<T, 32>
                      : p.size.head_dim == 64 ? values_kernel<T, 64>
                                              : values_kernel<T, 128>;
  cuda::launch("starting the product of weights and values", kernel, std::int64_t{w.heads} * (w.rows / kTile), kThreads,
               stream, p, w, spoilt);
}

template <class T>
void launch_as(const Params& p, Scratch w, std::uint8_t* spoilt, Stream stream) {
  const int all = static_cast<int>(p.size.batch * p.size.heads_q);
  const int at_once = w.heads;
  for (w.first_head = 0; w.first_head < all; w.first_head += at_once) {
    w.heads = std::min(at_once, all - w.first_head);
    cuda::launch("starting the product of queries and keys", scores_kernel<T>, w.elements() / (kTile * kTile), kThreads,
                 stream, p, w);
    const std::int64_t blocks_of_head = cuda::blocks_for(p.size.seqlen_q, kThreads / tile::kWarpSize);
    cuda::launch("starting the softmax", softmax_kernel<T>, w.heads * blocks_of_head, kThreads, stream, p, w);
    launch_values<T>(p, w, spoilt, stream);
  }
}

enum Slice { kScores, kWeights, kSpoiltFlags };

}  // namespace

void plan_unfused_wmma(const detail::Problem& problem, const DeviceInfo&, detail::Plan& plan) {
  const detail::Sizes& size = problem.size;
  const Scratch w = scratch_for(size);
  plan.slices[kScores] = plan.workspace.add(static_cast<std::size_t>(w.elements()) * sizeof(float));
  plan.slices[kWeights] = plan.workspace.add(static_cast<std::size_t>(w.elements()) * sizeof(detail::Float16));
  if (problem.causal == detail::CausalRule::none) return;
  plan.slices[kSpoiltFlags] = plan.workspace.add(static_cast<std::size_t>(size.batch * size.heads_q * w.rows / kSide));
}

void launch_unfused_wmma(const detail::Plan& plan, const Params& p, void* workspace, Stream stream) {
  const cuda::DeviceGuard guard(plan.device.index);
  if (p.size.total_q == 0) return;
  Scratch w = scratch_for(plan.problem.size);
  w.score = detail::slice<float>(workspace, plan.slices[kScores]);
  w.weight = detail::slice<void>(workspace, plan.slices[kWeights]);
  const bool excludes = plan.problem.causal != detail::CausalRule::none;
  auto* spoilt = excludes ? detail::slice<std::uint8_t>(workspace, plan.slices[kSpoiltFlags]) : nullptr;
  if (p.dtype == DType::float16) {
    launch_as<detail::Float16>(p, w, spoilt, stream);
  } else {
    launch_as<detail::BFloat16>(p, w, spoilt, stream);
  }
  if (spoilt) detail::repair_spoilt_rows(p, spoilt, w.rows / kSide, stream);
}

}  // namespace flashcore::ladder
