// The second rung: one kernel. Scores and weights never leave shared memory.
//
//   a block takes 64 (or 32) queries of one head:            two warps for each strip of 16 queries
//     q -> shared memory
//     for each block of 64 keys:
//       k -> shared memory; its v is on its way
//       scores  = q · kᵀ            WMMA; a warp makes 16 queries × 32 keys, stored to shared memory
//       v -> shared memory; the next k is on its way
//       softmax                     a warp takes 8 rows; maxima over a row by warp shuffles
//         new_max = max(max, scores)
//         weight  = 2^(score − new_max), rounded to 16 bits, to shared memory
//         factor  = 2^(max − new_max): what was summed so far was relative to the old maximum
//       out     = out · factor + weight · v     WMMA; a warp makes 16 queries × half of head_dim, kept in registers
//     out / sum -> shared memory -> memory
//
// This is the online softmax of Milakov and Gimelshein (2018) in the loop order of FlashAttention (Dao et al., 2022).
// What the next rung does better: here products and softmax wait for each other, and scores, weights and factors make a
// trip through shared memory because WMMA does not tell which lane holds which row.
#include <algorithm>

#include "../../cuda/launch.cuh"
#include "../common/repair.h"
#include "ladder.h"
#include "tile.cuh"

namespace flashcore::ladder {
namespace {

constexpr int kBlockN = 64;       // keys of a step
constexpr int kWarpsOfStrip = 2;  // they share the strip's scores and output by columns, its softmax by rows
constexpr int kTall = 64;         // query rows of a block
constexpr int kLow = 32;
constexpr const char* kRows = "rows";  // the word of such a height as a setting
constexpr int kNewBanks = 16;  // bytes that a row in shared memory is longer than it needs: its neighbour's columns lie
                               // in other banks

template <class T, int kHeadDim, int kBlockM>
struct FusedStorage {
  static constexpr int kPitch = kHeadDim + kNewBanks / static_cast<int>(sizeof(T));
  static constexpr int kWeightPitch = kBlockN + kNewBanks / static_cast<int>(sizeof(T));
  static constexpr int kScorePitch = kBlockN + kNewBanks / static_cast<int>(sizeof(float));
  static constexpr int kOutPitch = kHeadDim + kNewBanks / static_cast<int>(sizeof(float));
  struct Keys {
    alignas(kAlignment) T k[kBlockN][kPitch];
    alignas(kAlignment) T v[kBlockN][kPitch];
  };

  alignas(kAlignment) T q[kBlockM][kPitch];
  union {
    Keys keys;
    alignas(kAlignment) float out[kBlockM][kOutPitch];  // at the end, when no key is needed any more
  };
  alignas(kAlignment) float score[kBlockM][kScorePitch];
  alignas(kAlignment) T weight[kBlockM][kWeightPitch];
  alignas(kAlignment) float row_number[kSide][kSide];
  float factor[kBlockM];
  int spoilt[kBlockM / kSide];
};

/// The kernel's steps, as one thread takes part in them.
template <class T, int kHeadDim, int kBlockM>
struct FusedTile {
  using Storage = FusedStorage<T, kHeadDim, kBlockM>;
  static constexpr int kWarps = kBlockM / kSide * kWarpsOfStrip;
  static constexpr int kThreads = kWarps * tile::kWarpSize;
  static constexpr int kSoftmaxRows = kBlockM / kWarps;                  // of a warp
  static constexpr int kColumnTiles = kHeadDim / kSide / kWarpsOfStrip;  // of a warp, in the output

  const Params& p;
  Storage& s;
  const Head head;
  const int first_row;
  const int lane = static_cast<int>(threadIdx.x) % tile::kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / tile::kWarpSize;
  const int strip = warp / kWarpsOfStrip * kSide;  // its first row
  const int half = warp % kWarpsOfStrip;           // of the strip's columns
  const int softmax_row = warp * kSoftmaxRows;
  const float scale_log2 = static_cast<float>(p.score.scale * 1.4426950408889634);  // powers of 2 are cheaper

  Sums out[kColumnTiles];
  RowsInFlight<T, kThreads, kBlockN, kHeadDim> k_in_flight;
  RowsInFlight<T, kThreads, kBlockN, kHeadDim> v_in_flight;
  int row_of[Sums::num_elements];  // which row of the strip each element of `out` belongs to
  float max[kSoftmaxRows];         // of the rows softmax_row …, in every lane
  float sum[kSoftmaxRows];         // this lane's part

  /// q, zeros and the row numbers. WMMA keeps secret which elements a lane holds, but the secret is the same for every
  /// fragment of one type: a tile that holds its own row numbers gives it away.
  __device__ void begin() {
    stage_rows<kThreads, kHeadDim>(s.q, rows_of<const T>(p.q, head.batch, head.q), p.q.seq, first_row,
                                   static_cast<int>(p.size.seqlen_q));
    for (int i = static_cast<int>(threadIdx.x); i < kSide * kSide; i += kThreads)
      s.row_number[i / kSide][i % kSide] = static_cast<float>(i / kSide);
    if (threadIdx.x < kBlockM / kSide) s.spoilt[threadIdx.x] = 0;
    for (Sums& tile : out) wmma::fill_fragment(tile, 0.0f);
    for (int r = 0; r < kSoftmaxRows; ++r) {
      max[r] = -INFINITY;
      sum[r] = 0;
    }
    __syncthreads();  // q and the row numbers are there
    Sums numbers;
    wmma::load_matrix_sync(numbers, &s.row_number[0][0], kSide, wmma::mem_row_major);
    for (int e = 0; e < Sums::num_elements; ++e) row_of[e] = static_cast<int>(numbers.x[e]);
  }

  __device__ void fetch_k(int first_key) {
    k_in_flight.fetch(rows_of<const T>(p.k, head.batch, head.k), p.k.seq, first_key, static_cast<int>(p.size.seqlen_k));
  }
  __device__ void fetch_v(int first_key) {
    v_in_flight.fetch(rows_of<const T>(p.v, head.batch, head.k), p.v.seq, first_key, static_cast<int>(p.size.seqlen_k));
  }

  __device__ void score_keys() {
    constexpr int kKeyTiles = kBlockN / kSide / kWarpsOfStrip;  // of a warp
    const int first = half * kKeyTiles * kSide;
    Sums score[kKeyTiles];
    for (Sums& tile : score) wmma::fill_fragment(tile, 0.0f);
#pragma unroll 1  // registers are for what is in flight
    for (int d = 0; d < kHeadDim; d += kSide) {
      Left<T> q;
      load_tile(q, &s.q[strip][d], Storage::kPitch);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        RightTransposed<T> k;
        load_tile(k, &s.keys.k[first + n * kSide][d], Storage::kPitch);
        wmma::mma_sync(score[n], q, k, score[n]);
      }
    }
    for (int n = 0; n < kKeyTiles; ++n)
      wmma::store_matrix_sync(&s.score[strip][first + n * kSide], score[n], Storage::kScorePitch, wmma::mem_row_major);
  }

  /// Row `row` of the scores becomes weights. A row that has seen no key yet has the maximum −∞, and keeps it.
  __device__ void soften_row(int row, int keys_seen, float& row_max, float& row_sum) {
    constexpr int kColumnsOfLane = kBlockN / tile::kWarpSize;
    float score[kColumnsOfLane];
    float largest = -INFINITY;
    for (int n = 0; n < kColumnsOfLane; ++n) {
      const int column = lane + n * tile::kWarpSize;
      score[n] = column < keys_seen ? s.score[row][column] * scale_log2 : -INFINITY;
      largest = tile::Max::combine(largest, score[n]);
    }
    const float new_max = tile::Max::combine(row_max, tile::warp_reduce<tile::Max>(largest));
    const float origin = new_max == -INFINITY ? 0.0f : new_max;  // −∞ − −∞ would be NaN
    const float factor = exp2f(row_max - origin);
    row_sum *= factor;
    for (int n = 0; n < kColumnsOfLane; ++n) {
      const float weight = exp2f(score[n] - origin);
      row_sum += weight;
      detail::store(s.weight[row][lane + n * tile::kWarpSize], weight);
    }
    row_max = new_max;
    if (lane == 0) s.factor[row] = factor;
  }

  __device__ void soften(int first_key) {
#pragma unroll
    for (int r = 0; r < kSoftmaxRows; ++r)
      soften_row(softmax_row + r, visible_end(p, first_row + softmax_row + r) - first_key, max[r], sum[r]);
  }

  /// Row i of the output times s.factor[i].
  __device__ void scale_out() {
#pragma unroll
    for (int e = 0; e < Sums::num_elements; ++e) {
      const float factor = s.factor[strip + row_of[e]];
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) out[c].x[e] *= factor;
    }
  }

  __device__ void add_values() {
    const int first = half * kColumnTiles * kSide;
#pragma unroll 2
    for (int n = 0; n < kBlockN; n += kSide) {
      Left<T> weight;
      load_tile(weight, &s.weight[strip][n], Storage::kWeightPitch);
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        Right<T> v;
        load_tile(v, &s.keys.v[n][first + c * kSide], Storage::kPitch);
        wmma::mma_sync(out[c], weight, v, out[c]);
      }
    }
  }

  /// The factor of the last scaling is 1 / sum; a row that saw nothing gets 0. Writes lse.
  __device__ void finish_softmax() {
#pragma unroll
    for (int r = 0; r < kSoftmaxRows; ++r) {
      const float total = tile::warp_reduce<tile::Sum>(sum[r]);
      const bool empty = max[r] == -INFINITY;
      if (lane != 0) continue;
      const int row = softmax_row + r;
      s.factor[row] = empty ? 0.0f : 1.0f / total;
      if (!p.lse.data || first_row + row >= p.size.seqlen_q) continue;
      float* lse = static_cast<float*>(p.lse.data) + head.batch * p.lse.batch + head.q * p.lse.head;
      lse[(first_row + row) * p.lse.seq] = empty ? -INFINITY : (max[r] + log2f(total)) * tile::kLn2;
    }
  }

  /// `spoilt`: this tile's flags, or null where no key is excluded.
  __device__ void store(std::uint8_t* spoilt) {
    const int first = half * kColumnTiles * kSide;
    for (int c = 0; c < kColumnTiles; ++c)
      wmma::store_matrix_sync(&s.out[strip][first + c * kSide], out[c], Storage::kOutPitch, wmma::mem_row_major);
    __syncthreads();  // the output is whole
    store_rows<kThreads, kHeadDim>(s.out, rows_of<T>(p.out, head.batch, head.q), p.out.seq, first_row,
                                   static_cast<int>(p.size.seqlen_q), s.spoilt);
    if (!spoilt) return;
    __syncthreads();  // all rows were looked at
    if (threadIdx.x < kBlockM / kSide) spoilt[threadIdx.x] = static_cast<std::uint8_t>(s.spoilt[threadIdx.x]);
  }
};

/// One block, one tile. Tiles with many keys come first: later blocks fill the gaps that they leave.
template <class T, int kHeadDim, int kBlockM>
__global__ void __launch_bounds__(FusedTile<T, kHeadDim, kBlockM>::kThreads, kHeadDim <= 64 ? 2 : 1)
    fused_kernel(const __grid_constant__ Params p, int m_blocks, std::uint8_t* spoilt) {
  if constexpr (kHasBody<T>) {
    using Tile = FusedTile<T, kHeadDim, kBlockM>;
    extern __shared__ __align__(kAlignment) unsigned char s_storage[];
    const int head = static_cast<int>(blockIdx.x) / m_blocks;
    const int m_block = m_blocks - 1 - static_cast<int>(blockIdx.x) % m_blocks;
    Tile tile{p, *reinterpret_cast<typename Tile::Storage*>(s_storage), head_of(p, head), m_block * kBlockM};
    const int keys = tile_end(p, tile.first_row, kBlockM);

    tile.begin();
    tile.fetch_k(0);
    for (int first_key = 0; first_key < keys; first_key += kBlockN) {
      tile.k_in_flight.put(tile.s.keys.k);  // free: two barriers have passed since the last scores
      tile.fetch_v(first_key);
      __syncthreads();  // k is there; v and the weights of the step before are no longer needed
      tile.score_keys();
      tile.v_in_flight.put(tile.s.keys.v);
      tile.fetch_k(first_key + kBlockN);  // beyond the last key: zeros, without reading
      __syncthreads();                    // the scores are there, both halves of each row, and v
      tile.soften(first_key);
      __syncthreads();  // the weights and factors are there
      tile.scale_out();
      tile.add_values();
    }
    __syncthreads();  // keys and factors are no longer needed
    tile.finish_softmax();
    __syncthreads();  // the last factors are there
    tile.scale_out();
    constexpr int kFlags = kBlockM / kSide;
    tile.store(spoilt ? spoilt + (std::int64_t{head} * m_blocks + m_block) * kFlags : nullptr);
  }
}

int m_blocks_of(std::int64_t seqlen_q, int block_m) { return static_cast<int>((seqlen_q + block_m - 1) / block_m); }

template <class T, int kHeadDim, int kBlockM>
void launch_tiles(const Params& p, std::uint8_t* spoilt, Stream stream) {
  using Tile = FusedTile<T, kHeadDim, kBlockM>;
  constexpr int kSharedBytes = static_cast<int>(sizeof(typename Tile::Storage));
  const auto kernel = fused_kernel<T, kHeadDim, kBlockM>;
  const int m_blocks = m_blocks_of(p.size.seqlen_q, kBlockM);
  const std::int64_t blocks = p.size.batch * p.size.heads_q * m_blocks;
  if (blocks == 0) return;
  // A block gets 48 KB by default; more must be asked for, kernel by kernel. Cheap, and needed on each device.
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
              "reserving shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(Tile::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  cuda::check(cudaLaunchKernelEx(&config, kernel, p, m_blocks, spoilt), "starting the fused WMMA kernel");
}

template <class T, int kBlockM>
void launch_bucket(const Params& p, std::uint8_t* spoilt, Stream stream) {
  switch (p.size.head_dim) {
    case 32:
      return launch_tiles<T, 32, kBlockM>(p, spoilt, stream);
    case 64:
      return launch_tiles<T, 64, kBlockM>(p, spoilt, stream);
    default:
      return launch_tiles<T, 128, kBlockM>(p, spoilt, stream);
  }
}

template <class T>
void launch_as(const Params& p, int block_m, std::uint8_t* spoilt, Stream stream) {
  if (block_m == kTall) return launch_bucket<T, kTall>(p, spoilt, stream);
  launch_bucket<T, kLow>(p, spoilt, stream);
}

std::size_t tall_shared_bytes(std::int64_t head_dim) {
  using detail::Float16;
  return head_dim == 32   ? sizeof(FusedStorage<Float16, 32, kTall>)
         : head_dim == 64 ? sizeof(FusedStorage<Float16, 64, kTall>)
                          : sizeof(FusedStorage<Float16, 128, kTall>);
}

}  // namespace

std::vector<std::string> fused_wmma_settings(const detail::Problem& problem, const DeviceInfo& device) {
  std::vector<std::string> words{kRows + std::to_string(kLow)};
  if (device.shared_bytes_per_block >= tall_shared_bytes(problem.size.head_dim))
    words.push_back(kRows + std::to_string(kTall));
  return words;
}

/// Tall tiles read the keys less often; low ones fit where shared memory is small, and there are twice as many of them
/// to go round.
void plan_fused_wmma(const detail::Problem& problem, const DeviceInfo& device, detail::Plan& plan) {
  const detail::Sizes& size = problem.size;
  const std::int64_t heads = size.batch * size.heads_q;
  const bool fits = device.shared_bytes_per_block >= tall_shared_bytes(size.head_dim);
  const bool enough = heads * m_blocks_of(size.seqlen_q, kTall) >= device.multiprocessors;
  plan.block_m = fits && enough ? kTall : kLow;
  if (!plan.setting.empty()) plan.block_m = plan.setting == kRows + std::to_string(kTall) ? kTall : kLow;
  if (problem.causal == detail::CausalRule::none) return;
  const std::int64_t strips = std::int64_t{m_blocks_of(size.seqlen_q, plan.block_m)} * (plan.block_m / kSide);
  plan.slices[0] = plan.workspace.add(static_cast<std::size_t>(heads * strips));
}

void launch_fused_wmma(const detail::Plan& plan, const Params& p, void* workspace, Stream stream) {
  const cuda::DeviceGuard guard(plan.device.index);
  const bool excludes = plan.problem.causal != detail::CausalRule::none;
  auto* spoilt = excludes ? detail::slice<std::uint8_t>(workspace, plan.slices[0]) : nullptr;
  if (p.dtype == DType::float16) {
    launch_as<detail::Float16>(p, plan.block_m, spoilt, stream);
  } else {
    launch_as<detail::BFloat16>(p, plan.block_m, spoilt, stream);
  }
  const std::int64_t strips = std::int64_t{m_blocks_of(p.size.seqlen_q, plan.block_m)} * (plan.block_m / kSide);
  if (spoilt && p.size.total_q > 0) detail::repair_spoilt_rows(p, spoilt, strips, stream);
}

}  // namespace flashcore::ladder
