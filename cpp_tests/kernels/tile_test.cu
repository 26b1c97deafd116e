// The building blocks of tile/: masking, online softmax, the order of tiles, reductions, 16-byte vectors, and rows done
// one at a time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "../support/attention_case.h"
#include "../support/random.h"
#include "gpu_test.cuh"
#include "kernels/ptx/global.cuh"
#include "kernels/tile/exact_rows.cuh"
#include "kernels/tile/mask.cuh"
#include "kernels/tile/reduce.cuh"
#include "kernels/tile/scheduler.cuh"
#include "kernels/tile/softmax.cuh"
#include "kernels/tile/vector.cuh"
#include "validate.h"

namespace flashcore::testing {
namespace {

using detail::BFloat16;
using detail::Float16;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class CudaReduceTest : public HopperTest {};
class CudaMaskTest : public HopperTest {};
class CudaSchedulerTest : public HopperTest {};
class CudaSoftmaxTest : public HopperTest {};
class CudaVectorTest : public HopperTest {};

/// The rows and columns of a warpgroup's accumulators (ptx/wgmma.cuh).
__host__ __device__ constexpr int fragment_row(int thread, int e) {
  return thread / 32 * 16 + thread % 32 / 4 + 8 * (e >> 1 & 1);
}
__host__ __device__ constexpr int fragment_column(int thread, int e) { return 8 * (e >> 2) + 2 * (thread % 4) + e % 2; }

// ---- reductions -----------------------------------------------------------------------------------------------------

constexpr int kThreads = 192;

/// Reduces x and at once, with the same scratch memory, −x.
template <class Op, class T>
__global__ void reduce_twice(const T* x, T* results) {
  __shared__ T s_partial[kThreads / tile::kWarpSize];
  const T value = x[threadIdx.x];
  results[threadIdx.x] = tile::block_reduce<Op, kThreads>(value, s_partial);
  results[kThreads + threadIdx.x] = tile::block_reduce<Op, kThreads>(-value, s_partial);
}

template <class Op, class T>
void expect_reductions(const std::vector<T>& x, T expected, T expected_negative) {
  const DeviceArray input = to_device(x, kGpu);
  const Results<T> results(2 * kThreads);
  run_kernel(reduce_twice<Op, T>, 1, kThreads, 0, static_cast<const T*>(input.data()), results.data());
  const std::vector<T> actual = results.host();
  const auto same = [](T a, T b) { return a == b || (a != a && b != b); };
  for (int thread = 0; thread < kThreads; ++thread) {
    EXPECT_TRUE(same(actual[thread], expected)) << actual[thread] << " in thread " << thread;
    EXPECT_TRUE(same(actual[kThreads + thread], expected_negative)) << actual[kThreads + thread] << ", second call";
  }
}

/// Integers, whose sums are exact; the largest and the smallest stand in different warps.
template <class T>
std::vector<T> integers() {
  std::vector<T> x;
  for (int n = 0; n < kThreads; ++n) x.push_back(static_cast<T>((n * 37) % 101 - 40));
  return x;
}

TEST_F(CudaReduceTest, EveryThreadGetsTheSum) {
  double sum = 0;
  for (const double x : integers<double>()) sum += x;
  expect_reductions<tile::Sum, float>(integers<float>(), static_cast<float>(sum), static_cast<float>(-sum));
  expect_reductions<tile::Sum, double>(integers<double>(), sum, -sum);
}

TEST_F(CudaReduceTest, EveryThreadGetsTheExtremes) {
  expect_reductions<tile::Max, float>(integers<float>(), 60, 40);
  expect_reductions<tile::Min, float>(integers<float>(), -40, -60);
}

TEST_F(CudaReduceTest, NanIsNotHidden) {
  for (const int place : {0, 33, kThreads - 1}) {
    std::vector<float> x = integers<float>();
    x[place] = NAN;
    expect_reductions<tile::Max, float>(x, NAN, NAN);
    expect_reductions<tile::Min, float>(x, NAN, NAN);
    expect_reductions<tile::Sum, float>(x, NAN, NAN);
  }
}

__global__ void reduce_warps(const float* x, float* results) {
  results[threadIdx.x] = tile::warp_reduce<tile::Sum>(x[threadIdx.x]);
}

TEST_F(CudaReduceTest, WarpsReduceApart) {
  const std::vector<float> x = integers<float>();
  const DeviceArray input = to_device(x, kGpu);
  const Results<float> results(kThreads);
  run_kernel(reduce_warps, 1, kThreads, 0, static_cast<const float*>(input.data()), results.data());
  std::vector<float> expected(kThreads, 0.0f);
  for (int thread = 0; thread < kThreads; ++thread)
    for (int lane = 0; lane < 32; ++lane) expected[thread] += x[thread / 32 * 32 + lane];
  EXPECT_EQ(results.host(), expected);
}

// ---- masking --------------------------------------------------------------------------------------------------------

constexpr int kMaskColumns = 128;

__global__ void mask_scores(tile::KeyWindow window, int first_key, int first_row, float* scores, int* ends) {
  float s[kMaskColumns / 2];
  const int thread = static_cast<int>(threadIdx.x);
  for (int e = 0; e < kMaskColumns / 2; ++e) s[e] = static_cast<float>(e + 1);
  const int row = first_row + fragment_row(thread, 0);
  tile::mask_by_position(s, window, first_key, row, thread % 4);
  for (int e = 0; e < kMaskColumns / 2; ++e) scores[thread * (kMaskColumns / 2) + e] = s[e];
  ends[2 * thread] = window.begin(row);
  ends[2 * thread + 1] = window.end(row);
}

bool sees(const tile::KeyWindow& w, int row, int key) {
  return key >= 0 && key < w.seqlen_k && (w.left < 0 || key >= row + w.shift - w.left) &&
         (w.right < 0 || key <= row + w.shift + w.right);
}

TEST_F(CudaMaskTest, KeepsTheWindowAndNothingElse) {
  constexpr int kRegisters = kMaskColumns / 2;
  // full, causal (square, more keys, fewer keys, top-left), windows to both sides, to one side, of one key, far away
  constexpr tile::KeyWindow kWindows[] = {{200, 0, -1, -1},  {200, 0, -1, 0},  {300, 100, -1, 0}, {100, -100, -1, 0},
                                          {300, 0, -1, 0},   {200, 0, 20, 10}, {200, 60, 15, -1}, {200, 0, 0, 0},
                                          {200, -90, -1, 7}, {65, 900, 30, 4}};
  for (const tile::KeyWindow& window : kWindows)
    for (const int first_key : {0, 128})
      for (const int first_row : {0, 64, 131}) {
        const Results<float> scores(128 * kRegisters);
        const Results<int> ends(2 * 128);
        run_kernel(mask_scores, 1, 128, 0, window, first_key, first_row, scores.data(), ends.data());
        const std::vector<float> s = scores.host();
        const std::vector<int> e = ends.host();
        int wrong = 0;
        for (int thread = 0; thread < 128; ++thread) {
          const int row = first_row + fragment_row(thread, 0);
          for (int i = 0; i < kRegisters; ++i) {
            const bool kept = sees(window, row + 8 * (i >> 1 & 1), first_key + fragment_column(thread, i));
            wrong += s[thread * kRegisters + i] != (kept ? static_cast<float>(i + 1) : -kInfinity);
          }
          for (int key = -1; key <= window.seqlen_k; ++key)
            wrong += (key >= e[2 * thread] && key < e[2 * thread + 1]) != sees(window, row, key);
        }
        EXPECT_EQ(wrong, 0) << "window " << window.seqlen_k << ", " << window.shift << ", " << window.left << ", "
                            << window.right << ", first key " << first_key << ", first row " << first_row;
      }
}

// ---- the order of tiles ---------------------------------------------------------------------------------------------

__global__ void list_tiles(tile::TileOrder order, bool octaves, int* list) {
  for (int n = static_cast<int>(threadIdx.x); n < order.tiles; n += static_cast<int>(blockDim.x)) {
    const tile::Tile tile = octaves ? tile::tile_by_octaves(order, n) : tile::tile_at(order, n);
    list[2 * n] = tile.m_block;
    list[2 * n + 1] = tile.head;
  }
}

std::vector<int> tiles_of(const tile::TileOrder& order, bool octaves) {
  const Results<int> list(static_cast<std::size_t>(2 * order.tiles));
  run_kernel(list_tiles, 1, 128, 0, order, octaves, list.data());
  return list.host();
}

// The last section may be short, a section may be one head, or all of them.
constexpr tile::TileOrder kOrders[] = {{1, 1, 1, 1},    {7, 5, 2, 35},   {4, 12, 4, 48},
                                       {3, 10, 10, 30}, {5, 6, 100, 30}, {1, 9, 4, 9}};

TEST_F(CudaSchedulerTest, EveryTileComesOnce) {
  for (const tile::TileOrder& order : kOrders)
    for (const bool octaves : {false, true}) {
      const std::vector<int> list = tiles_of(order, octaves);
      std::vector<int> times(static_cast<std::size_t>(order.tiles), 0);
      for (int n = 0; n < order.tiles; ++n) {
        ASSERT_TRUE(list[2 * n] >= 0 && list[2 * n] < order.m_blocks) << "tile " << n;
        ASSERT_TRUE(list[2 * n + 1] >= 0 && list[2 * n + 1] < order.heads) << "tile " << n;
        ++times[static_cast<std::size_t>(list[2 * n + 1] * order.m_blocks + list[2 * n])];
      }
      EXPECT_EQ(times, std::vector<int>(times.size(), 1)) << order.m_blocks << " × " << order.heads << ", " << octaves;
    }
}

TEST_F(CudaSchedulerTest, InASectionTheLongestTilesComeFirst) {
  for (const tile::TileOrder& order : kOrders) {
    const std::vector<int> list = tiles_of(order, false);
    for (int n = 1; n < order.tiles; ++n) {
      const int section = list[2 * n + 1] / order.section_heads;
      const int section_before = list[2 * n - 1] / order.section_heads;
      EXPECT_GE(section, section_before) << "tile " << n;  // the keys of one section are done with before the next
      if (section == section_before) EXPECT_LE(list[2 * n], list[2 * n - 2]) << "tile " << n;
    }
  }
}

TEST_F(CudaSchedulerTest, TheLongerHalfOfAllHeadsComesFirst) {
  for (const tile::TileOrder& order : kOrders) {
    const std::vector<int> list = tiles_of(order, true);
    int n = 0;
    for (int rows = order.m_blocks; rows > 0; rows /= 2)
      for (const int end = n + (rows - rows / 2) * order.heads; n < end; ++n)
        EXPECT_TRUE(list[2 * n] >= rows / 2 && list[2 * n] < rows) << "tile " << n << " is of row " << list[2 * n];
  }
}

/// As the forward's scheduling warp does: a block's first tile is its own number, the others are drawn.
__global__ void draw_tiles(tile::TileCounter counter, int tiles, int* times_drawn, int* last_blocks) {
  if (blockIdx.x == 0) {
    __nanosleep(20000);  // the others come before the counter is open
    counter.open(gridDim.x);
  }
  for (int index = blockIdx.x; index < tiles; index = counter.draw()) atomicAdd(&times_drawn[index], 1);
  if (counter.leave(gridDim.x)) atomicAdd(last_blocks, 1);
}

/// Whatever lies in the counter's memory, and again with the same tag: so a captured launch is replayed.
TEST_F(CudaSchedulerTest, EveryTileIsDrawnOnce) {
  constexpr int kBlocks = 24;
  for (const int tiles : {5, 24, 25, 500}) {
    const Results<unsigned long long> word(1);
    const tile::TileCounter counter{word.data(), 7};
    for (int launch = 1; launch <= 3; ++launch) {
      const DeviceArray times = to_device(std::vector<int>(static_cast<std::size_t>(tiles)), kGpu);
      const DeviceArray last = to_device(std::vector<int>(1), kGpu);
      run_kernel(draw_tiles, kBlocks, 1, 0, counter, tiles, static_cast<int*>(times.data()),
                 static_cast<int*>(last.data()));
      EXPECT_EQ(to_host<int>(times), std::vector<int>(static_cast<std::size_t>(tiles), 1)) << "launch " << launch;
      EXPECT_EQ(to_host<int>(last)[0], 1) << "one block is the last";
      EXPECT_EQ(word.host()[0], 0u) << "the tag stays behind";
    }
  }
}

// ---- online softmax -------------------------------------------------------------------------------------------------

constexpr int kRows = 64;
constexpr int kColumns = 32;
constexpr int kBlocks = 6;
constexpr int kAll = kBlocks * kRows * kColumns;

struct Sink {
  bool given;
  float logit;  // in raw units
};

/// Softens kBlocks blocks of scores. out: the weights added up over the blocks, column by column, and normalised.
__global__ void soften(const float* scores, float scale_log2, float threshold, Sink sink, float* out, float* lse,
                       int* moved) {
  constexpr int kRegisters = kColumns / 2;
  const int thread = static_cast<int>(threadIdx.x);
  tile::OnlineSoftmax softmax;
  if (sink.given) softmax.start_with(sink.logit, scale_log2, thread % 4 == 0);
  float sums[kRegisters] = {};
  for (int block = 0; block < kBlocks; ++block) {
    float s[kRegisters];
    for (int e = 0; e < kRegisters; ++e)
      s[e] = scores[(block * kRows + fragment_row(thread, e)) * kColumns + fragment_column(thread, e)];
    softmax.take_max(s, scale_log2, threshold);
    if (softmax.moved) softmax.rescale(sums);
    softmax.exponentiate(s, scale_log2);
    for (int e = 0; e < kRegisters; ++e) sums[e] += s[e];
    moved[block * 128 + thread] = softmax.moved;
  }
  const float inverse[2] = {softmax.finish(0), softmax.finish(1)};
  for (int e = 0; e < kRegisters; ++e)
    out[fragment_row(thread, e) * kColumns + fragment_column(thread, e)] = sums[e] * inverse[e >> 1 & 1];
  for (int r = 0; r < 2; ++r)
    if (thread % 4 == 0) lse[fragment_row(thread, 2 * r)] = softmax.lse(r, scale_log2);
}

struct Softened {
  std::vector<float> out;
  std::vector<float> lse;
  std::vector<int> moved;
};

constexpr float kScaleLog2 = 0.18f;
constexpr float kThreshold = 8 / kScaleLog2;

Softened softened(const std::vector<float>& scores, Sink sink = {false, 0}) {
  const DeviceArray input = to_device(scores, kGpu);
  const Results<float> out(kRows * kColumns);
  const Results<float> lse(kRows);
  const Results<int> moved(kBlocks * 128);
  run_kernel(soften, 1, 128, 0, static_cast<const float*>(input.data()), kScaleLog2, kThreshold, sink, out.data(),
             lse.data(), moved.data());
  return {out.host(), lse.host(), moved.host()};
}

/// Normal scores, to which step·block is added: rising, falling or level from block to block.
std::vector<float> random_scores(float step) {
  Random random(3);
  std::vector<float> scores;
  for (int n = 0; n < kAll; ++n)
    scores.push_back(static_cast<float>(random.normal()) + step * static_cast<float>(n / (kRows * kColumns)));
  return scores;
}

float score_at(const std::vector<float>& scores, int block, int row, int column) {
  return scores[static_cast<std::size_t>((block * kRows + row) * kColumns + column)];
}

void expect_softmax(const std::vector<float>& scores, Sink sink = {false, 0}) {
  const Softened actual = softened(scores, sink);
  for (int row = 0; row < kRows; ++row) {
    double max = sink.given ? sink.logit : -INFINITY;
    double largest = sink.given ? std::fabs(sink.logit) : 0;
    for (int n = 0; n < kBlocks * kColumns; ++n) {
      const double s = score_at(scores, n / kColumns, row, n % kColumns);
      max = std::max(max, s);
      if (std::isfinite(s)) largest = std::max(largest, std::fabs(s));
    }
    const bool empty = max == -INFINITY;
    double sum = sink.given ? std::exp2((sink.logit - max) * kScaleLog2) : 0;
    std::vector<double> columns(kColumns, 0.0);
    for (int n = 0; n < kBlocks * kColumns && !empty; ++n) {
      const double weight =
          std::exp2((static_cast<double>(score_at(scores, n / kColumns, row, n % kColumns)) - max) * kScaleLog2);
      sum += weight;
      columns[static_cast<std::size_t>(n % kColumns)] += weight;
    }
    // A float's rounding of the exponents, twice, and two ulp of ex2, for each of up to kBlocks rescalings.
    const double bound = kBlocks * (std::ldexp(largest * kScaleLog2, -22) + std::ldexp(1.0, -21));
    for (int column = 0; column < kColumns; ++column) {
      const double exact = empty ? 0 : columns[static_cast<std::size_t>(column)] / sum;
      EXPECT_NEAR(actual.out[static_cast<std::size_t>(row * kColumns + column)], exact, bound) << row << ", " << column;
    }
    const double lse = std::log(2.0) * (max * kScaleLog2 + std::log2(sum));
    if (empty)
      EXPECT_EQ(actual.lse[static_cast<std::size_t>(row)], -kInfinity) << "row " << row;
    else
      EXPECT_NEAR(actual.lse[static_cast<std::size_t>(row)], lse, bound * (1 + std::fabs(lse))) << "row " << row;
  }
}

constexpr float kBigStep = 3 * kThreshold;

TEST_F(CudaSoftmaxTest, IsTheSoftmaxOfLevelScores) { expect_softmax(random_scores(0)); }
TEST_F(CudaSoftmaxTest, IsTheSoftmaxOfScoresThatRiseByMoreThanTheThreshold) { expect_softmax(random_scores(kBigStep)); }
TEST_F(CudaSoftmaxTest, IsTheSoftmaxOfScoresThatRiseByLessThanTheThreshold) {
  expect_softmax(random_scores(kThreshold / 3));
}
TEST_F(CudaSoftmaxTest, IsTheSoftmaxOfFallingScores) { expect_softmax(random_scores(-kBigStep)); }

TEST_F(CudaSoftmaxTest, MaskedScoresCountForNothing) {
  std::vector<float> scores = random_scores(kThreshold / 2);
  for (int n = 0; n < kAll; ++n) {
    const int block = n / (kRows * kColumns);
    const int row = n / kColumns % kRows;
    const bool whole_row = row % 5 == 2;
    const bool till_late = row % 5 == 3 && block < 4;
    if (whole_row || till_late || n % 3 == 0) scores[static_cast<std::size_t>(n)] = -kInfinity;
  }
  expect_softmax(scores);
}

TEST_F(CudaSoftmaxTest, ASinkTakesItsPartOfTheWeight) {
  for (const float logit : {-20.0f, 0.0f, 5.0f, 400.0f}) {
    SCOPED_TRACE(logit);
    expect_softmax(random_scores(0), {true, logit});
  }
}

/// Which warps must move their maximum: those in which some row's block passes its maximum by the threshold.
std::vector<int> expected_moves(const std::vector<float>& scores) {
  std::vector<int> moves(kBlocks * 128, 0);
  std::vector<float> max(kRows, -kInfinity);
  for (int block = 0; block < kBlocks; ++block)
    for (int warp = 0; warp < 4; ++warp) {
      bool moves_now = false;
      std::vector<float> own(16, -kInfinity);
      for (int r = 0; r < 16; ++r) {
        for (int column = 0; column < kColumns; ++column)
          own[r] = std::max(own[r], score_at(scores, block, 16 * warp + r, column));
        moves_now = moves_now || own[r] > max[16 * warp + r] + kThreshold;
      }
      if (!moves_now) continue;
      for (int r = 0; r < 16; ++r) max[16 * warp + r] = std::max(max[16 * warp + r], own[r]);
      std::fill_n(moves.begin() + block * 128 + 32 * warp, 32, 1);
    }
  return moves;
}

TEST_F(CudaSoftmaxTest, TheMaximumMovesWhenAScorePassesItByTheThreshold) {
  std::vector<float> one_row = random_scores(0);
  one_row[static_cast<std::size_t>((3 * kRows + 37) * kColumns + 11)] += 2 * kThreshold;
  for (const std::vector<float>& scores :
       {random_scores(kBigStep), random_scores(0.5f * kThreshold), random_scores(-kBigStep), one_row})
    EXPECT_EQ(softened(scores).moved, expected_moves(scores));
}

TEST_F(CudaSoftmaxTest, RisingScoresMoveItEachTimeAndFallingOnesOnlyOnce) {
  EXPECT_EQ(softened(random_scores(kBigStep)).moved, std::vector<int>(kBlocks * 128, 1));
  std::vector<int> once(kBlocks * 128, 0);
  std::fill_n(once.begin(), 128, 1);
  EXPECT_EQ(softened(random_scores(-kBigStep)).moved, once);
}

template <class T>
__global__ void pack_fragment(const float* x, std::uint32_t* packed) {
  float s[8];
  std::uint32_t p[4];
  for (int e = 0; e < 8; ++e) s[e] = x[8 * threadIdx.x + e];
  tile::pack_weights<T>(s, p);
  for (int i = 0; i < 4; ++i) packed[4 * threadIdx.x + i] = p[i];
}

TEST_F(CudaSoftmaxTest, WeightsArePackedInPairsInPlace) {
  std::vector<float> x;
  for (int n = 0; n < 256; ++n) x.push_back(static_cast<float>(n));
  const DeviceArray input = to_device(x, kGpu);
  const Results<std::uint32_t> packed(128);
  run_kernel(pack_fragment<BFloat16>, 1, 32, 0, static_cast<const float*>(input.data()), packed.data());
  const std::vector<std::uint32_t> words = packed.host();
  for (std::size_t n = 0; n < words.size(); ++n) {
    EXPECT_EQ(words[n] << 16, detail::bits_of(x[2 * n])) << "pair " << n;
    EXPECT_EQ(words[n] & 0xffff0000u, detail::bits_of(x[2 * n + 1])) << "pair " << n;
  }
}

// ---- vectors --------------------------------------------------------------------------------------------------------

__global__ void transpose_quads(std::uint32_t* out) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  std::uint32_t x[4];
  for (int i = 0; i < 4; ++i) x[i] = threadIdx.x / 4 * 16 + 4 * i + t;  // row i, column t
  tile::quad_transpose(x, t);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = x[i];
}

TEST_F(CudaVectorTest, AQuadGathersRows) {
  const Results<std::uint32_t> gathered(128);
  run_kernel(transpose_quads, 1, 32, 0, gathered.data());
  std::vector<std::uint32_t> expected(128);  // thread t of a quad has row t
  for (std::uint32_t n = 0; n < 128; ++n) expected[n] = n;
  EXPECT_EQ(gathered.host(), expected);
}

__global__ void store_some(std::uint32_t* words, std::uint16_t* halves) {
  const auto lane = threadIdx.x;
  const std::uint32_t x[4] = {4 * lane, 4 * lane + 1, 4 * lane + 2, 4 * lane + 3};
  ptx::store_if(lane % 3 == 0, words + 4 * lane, x);
  ptx::store_if(lane % 2 == 0, halves + lane, static_cast<std::uint16_t>(lane));
}

TEST_F(CudaVectorTest, OnlyLanesThatWantToStore) {
  const Results<std::uint32_t> words(128);
  const Results<std::uint16_t> halves(32);
  run_kernel(store_some, 1, 32, 0, words.data(), halves.data());
  std::vector<std::uint32_t> expected_words(128, 0xffffffffu);
  std::vector<std::uint16_t> expected_halves(32, 0xffffu);
  for (std::uint32_t n = 0; n < 128; ++n)
    if (n / 4 % 3 == 0) expected_words[n] = n;
  for (std::uint16_t n = 0; n < 32; n += 2) expected_halves[n] = n;
  EXPECT_EQ(words.host(), expected_words);
  EXPECT_EQ(halves.host(), expected_halves);
}

// ---- rows one at a time ---------------------------------------------------------------------------------------------

template <class T>
__global__ void exact_rows(const __grid_constant__ detail::Params p) {
  const int batch = static_cast<int>(blockIdx.x) / p.size.heads_q;
  const int head = static_cast<int>(blockIdx.x) % p.size.heads_q;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < p.size.seqlen_q; i += static_cast<int>(blockDim.x) / 32)
    tile::exact_row<T, 256>(p, batch, head, i);
}

class CudaExactRowsTest : public HopperTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(CudaExactRowsTest, AgreeWithTheOracle) {
  for (const Variant& variant : all_variants()) {
    SCOPED_TRACE(variant.name);
    const detail::Problem problem = detail::parse_problem(GetParam());
    AttentionCase c(problem, kGpu, variant);
    const detail::Call call = detail::validate(c.inputs(), c.outputs(), c.options, detail::Check::shapes, nullptr);
    const auto kernel = problem.dtype == DType::float16 ? exact_rows<Float16> : exact_rows<BFloat16>;
    run_kernel(kernel, static_cast<int>(problem.size.batch * problem.size.heads_q), 96, 0, call.params);
    c.download();
    c.check();
  }
}

INSTANTIATE_TEST_SUITE_P(
    Rows, CudaExactRowsTest,
    ::testing::Values("fwd fp16 b2 q17 k40 h4/2 d16 lse", "fwd bf16 b1 q5 k70 h1 d256 lse",
                      "fwd fp16 b1 q21 k9 h2 d8/33 causal_br lse", "fwd bf16 b1 q21 k9 h2 d16 causal_tl lse",
                      "fwd fp16 b1 q33 k33 h1 d16 window4,3 lse", "fwd bf16 b2 q21 k9 h2 d16 causal_br sinks lse",
                      "fwd fp16 b2 q19 k83 h4/2 d20/12 causal_br window7,* softcap3 scale0.3 mask bias alibi sinks lse",
                      "fwd bf16 b2 q19 k23 h4/2 d20/12 softcap3 scale0.3 mask bias alibi lse"),
    [](const auto& info) { return "case" + std::to_string(info.index); });

}  // namespace
}  // namespace flashcore::testing
