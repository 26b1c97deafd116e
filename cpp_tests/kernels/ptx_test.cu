// The instruction wrappers of ptx/barrier.cuh and ptx/warp.cuh, one behaviour at a time. Writers dawdle, so that a wait
// that does not wait is seen.
#include <array>
#include <cmath>

#include "../support/float_formats.h"
#include "gpu_test.cuh"
#include "kernels/ptx/barrier.cuh"
#include "kernels/ptx/warp.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flashcore::testing {
namespace {

using detail::BFloat16;
using detail::Float16;

class CudaBarrierTest : public HopperTest {};
class CudaWarpTest : public HopperTest {};

__device__ void dawdle() { __nanosleep(20000); }

// ---- barriers -------------------------------------------------------------------------------------------------------

__global__ void count_arrivals(int* counted) {
  __shared__ std::uint64_t s_barrier;
  __shared__ int s_arrived;
  const std::uint32_t barrier = ptx::shared_address(&s_barrier);
  if (threadIdx.x == 0) {
    s_arrived = 0;
    ptx::barrier_init(barrier, 96);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    ptx::barrier_wait(barrier, 0);
    if (threadIdx.x == 0) *counted = *static_cast<volatile int*>(&s_arrived);
  } else {
    if (threadIdx.x >= 96) dawdle();
    atomicAdd(&s_arrived, 1);
    ptx::barrier_arrive(barrier);
  }
}

TEST_F(CudaBarrierTest, AnMbarrierOpensAtItsLastArrival) {
  const Results<int> counted(1);
  run_kernel(count_arrivals, 1, 128, 0, counted.data());
  EXPECT_EQ(counted.host()[0], 96);
}

/// One warp hands `rounds` words to another through one slot: a full and an empty barrier, whose parity alternates.
__global__ void hand_over(int rounds, int4* received) {
  __shared__ std::uint64_t s_barriers[2];
  __shared__ int4 s_words;
  const std::uint32_t full = ptx::shared_address(&s_barriers[0]);
  const std::uint32_t empty = ptx::shared_address(&s_barriers[1]);
  if (threadIdx.x == 0) {
    ptx::barrier_init(full, 1);
    ptx::barrier_init(empty, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  for (int n = 0; n < rounds; ++n) {
    const auto parity = static_cast<std::uint32_t>(n & 1);
    if (threadIdx.x == 0) {
      ptx::barrier_wait(empty, parity ^ 1);  // a fresh barrier lets the first pass through
      if (n % 3 == 0) dawdle();
      ptx::store_shared(ptx::shared_address(&s_words), 7 - n, n, -n, 1);
      ptx::barrier_arrive(full);
    } else if (threadIdx.x == 32) {
      ptx::barrier_wait(full, parity);
      if (n % 5 == 0) dawdle();
      received[n] = ptx::load_shared_x4(ptx::shared_address(&s_words));
      ptx::barrier_arrive(empty);
    }
  }
}

TEST_F(CudaBarrierTest, ParityTellsTheRoundsOfARingApart) {
  constexpr int kRounds = 101;
  const Results<int4> received(kRounds);
  run_kernel(hand_over, 1, 64, 0, kRounds, received.data());
  const std::vector<int4> words = received.host();
  for (int n = 0; n < kRounds; ++n) {
    const int4& x = words[static_cast<std::size_t>(n)];
    EXPECT_EQ((std::array{x.x, x.y, x.z, x.w}), (std::array{7 - n, n, -n, 1})) << "round " << n;
  }
}

__global__ void wait_for_a_warp_that_goes_on(int* seen) {
  __shared__ volatile int s_word;
  if (threadIdx.x == 0) s_word = 0;
  __syncthreads();
  if (threadIdx.x < 32) {
    ptx::named_sync(3, 64);
    if (threadIdx.x == 0) *seen = s_word;
  } else {
    dawdle();
    if (threadIdx.x == 32) s_word = 41;
    __syncwarp();
    ptx::named_arrive(3, 64);
  }
}

TEST_F(CudaBarrierTest, ANamedBarrierHoldsUntilTheOthersArrive) {
  const Results<int> seen(1);
  run_kernel(wait_for_a_warp_that_goes_on, 1, 64, 0, seen.data());
  EXPECT_EQ(seen.host()[0], 41);
}

/// `warps` warps write their numbers in turn, as the forward kernel's consumers multiply in turn.
__global__ void take_turns(int warps, int rounds, int* log) {
  __shared__ int s_next;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) s_next = 0;
  __syncthreads();
  if (warp == 0) ptx::named_arrive(1 + warps - 1, 64);  // the last warp's turn, so that the first is not the first
  for (int n = 0; n < rounds; ++n) {
    ptx::named_sync(1 + warp, 64);
    if (threadIdx.x % 32 == 0) log[atomicAdd(&s_next, 1)] = warp;
    if (warp == 0 && n % 4 == 0) dawdle();
    __syncwarp();
    const bool last = n == rounds - 1 && warp == (warps + warps - 2) % warps;  // nobody waits for this turn any more
    if (!last) ptx::named_arrive(1 + (warp + 1) % warps, 64);
  }
}

TEST_F(CudaBarrierTest, NamedBarriersPassTurnsOn) {
  constexpr int kWarps = 3;
  constexpr int kRounds = 20;
  const Results<int> log(kWarps * kRounds);
  run_kernel(take_turns, 1, 32 * kWarps, 0, kWarps, kRounds, log.data());
  std::vector<int> expected;
  for (int n = 0; n < kWarps * kRounds; ++n) expected.push_back((n + kWarps - 1) % kWarps);
  EXPECT_EQ(log.host(), expected);
}

// ---- warps ----------------------------------------------------------------------------------------------------------

__global__ void elect_twice(int* chosen) {
  const int first = ptx::elect();
  const int second = ptx::elect();
  chosen[threadIdx.x] = first + 2 * second;
}

TEST_F(CudaWarpTest, ElectChoosesOneLaneAndTheSameOneAgain) {
  const Results<int> chosen(96);
  run_kernel(elect_twice, 1, 96, 0, chosen.data());
  const std::vector<int> lanes = chosen.host();
  for (int warp = 0; warp < 3; ++warp) {
    int both = 0;
    int neither = 0;
    for (int lane = 0; lane < 32; ++lane) {
      both += lanes[32 * warp + lane] == 3;
      neither += lanes[32 * warp + lane] == 0;
    }
    EXPECT_EQ(both, 1) << "warp " << warp;
    EXPECT_EQ(neither, 31) << "warp " << warp;
  }
}

__global__ void exponentiate(const float* x, float* y) { y[threadIdx.x] = ptx::ex2(x[threadIdx.x]); }

std::vector<float> ex2_of(const std::vector<float>& x) {
  const Results<float> y(x.size());
  const DeviceArray input = to_device(x, kGpu);
  run_kernel(exponentiate, 1, static_cast<int>(x.size()), 0, static_cast<const float*>(input.data()), y.data());
  return y.host();
}

TEST_F(CudaWarpTest, Ex2IsWithinTwoUlp) {
  std::vector<float> x;
  for (int n = 0; n < 1000; ++n) x.push_back(-126.0f + 0.2531f * static_cast<float>(n));
  const std::vector<float> y = ex2_of(x);
  for (std::size_t n = 0; n < x.size(); ++n) {
    const double exact = std::exp2(static_cast<double>(x[n]));
    EXPECT_LE(std::fabs(y[n] - exact), std::ldexp(exact, -22)) << "2^" << x[n];
  }
}

TEST_F(CudaWarpTest, Ex2OfMinusInfinityIsZeroAndOfZeroIsOne) {
  EXPECT_EQ(ex2_of({-INFINITY, 0.0f, -0.0f, INFINITY, -200.0f}), (std::vector<float>{0, 1, 1, INFINITY, 0}));
}

template <class T>
__global__ void pack_pairs(const float* x, std::uint32_t* packed) {
  packed[threadIdx.x] = ptx::pack<T>(x[2 * threadIdx.x], x[2 * threadIdx.x + 1]);
}

template <class T>
void expect_pack_rounds_to(DType dtype) {
  std::vector<float> x = {0.0f, -0.0f, 1.0f, -2.5f, 65504.0f, 1e-7f, INFINITY, -INFINITY};
  // Ties of float16 (2^-11) and of bfloat16 (2^-8), to the even neighbour below and above, and just beside them.
  for (const float unit : {std::ldexp(1.0f, -11), std::ldexp(1.0f, -8)})
    for (const float tie : {1 + unit, 1 + 3 * unit, -1 - unit, 1 + unit + std::ldexp(1.0f, -20)}) x.push_back(tie);
  const DeviceArray input = to_device(x, kGpu);
  const Results<std::uint32_t> packed(x.size() / 2);
  run_kernel(pack_pairs<T>, 1, static_cast<int>(x.size() / 2), 0, static_cast<const float*>(input.data()),
             packed.data());
  const std::vector<std::uint32_t> words = packed.host();
  for (std::size_t n = 0; n < words.size(); ++n) {
    EXPECT_EQ(words[n] & 0xffff, encode(dtype, x[2 * n])) << x[2 * n] << ", the lower half";
    EXPECT_EQ(words[n] >> 16, encode(dtype, x[2 * n + 1])) << x[2 * n + 1] << ", the upper half";
  }
}

TEST_F(CudaWarpTest, PackRoundsToFloat16) { expect_pack_rounds_to<Float16>(DType::float16); }
TEST_F(CudaWarpTest, PackRoundsToBFloat16) { expect_pack_rounds_to<BFloat16>(DType::bfloat16); }

/// Register i of lane l holds 100·i + 2l and the number after it; tile i's rows are 48 bytes apart, from 800·i on.
__global__ void store_tiles(std::uint16_t* memory) {
  __shared__ __align__(16) std::uint16_t s_memory[1600];
  for (int n = static_cast<int>(threadIdx.x); n < 1600; n += 32) s_memory[n] = 0xffff;
  __syncwarp();
  const auto lane = threadIdx.x;
  const std::uint32_t row = ptx::shared_address(s_memory) + lane / 8 * 800 + lane % 8 * 48;
  const auto word = [&](std::uint32_t i) { return (100 * i + 2 * lane) | (100 * i + 2 * lane + 1) << 16; };
  ptx::store_matrix_x4(row, word(0), word(1), word(2), word(3));
  __syncwarp();
  for (int n = static_cast<int>(threadIdx.x); n < 1600; n += 32) memory[n] = s_memory[n];
}

TEST_F(CudaWarpTest, StoreMatrixPutsEachTileWhereItsRowsSay) {
  const Results<std::uint16_t> memory(1600);
  run_kernel(store_tiles, 1, 32, 0, memory.data());
  std::vector<std::uint16_t> expected(1600, 0xffff);
  for (int tile = 0; tile < 4; ++tile)
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column) {
        const int lane = 4 * row + column / 2;
        expected[400 * tile + 24 * row + column] = static_cast<std::uint16_t>(100 * tile + 2 * lane + column % 2);
      }
  EXPECT_EQ(memory.host(), expected);
}

template <class T>
__global__ void take_max_pairs(const std::uint32_t* a, const std::uint32_t* b, std::uint32_t* larger) {
  larger[threadIdx.x] = ptx::max_pair<T>(a[threadIdx.x], b[threadIdx.x]);
}

/// Every number of a list beside every other, in both halves.
template <class T>
void expect_max_pairs(DType dtype) {
  std::vector<std::uint32_t> numbers;
  const std::vector<double> given = {0, 1, -1, 2.5, -3, INFINITY, -INFINITY, NAN, std::ldexp(1.0, -14)};
  for (const double x : given) numbers.push_back(static_cast<std::uint32_t>(encode(dtype, x)));
  std::vector<std::uint32_t> a;
  std::vector<std::uint32_t> b;
  for (const std::uint32_t x : numbers)
    for (const std::uint32_t y : numbers) {
      a.push_back(x << 16 | y);
      b.push_back(y << 16 | x);
    }
  const DeviceArray first = to_device(a, kGpu);
  const DeviceArray second = to_device(b, kGpu);
  const Results<std::uint32_t> larger(a.size());
  run_kernel(take_max_pairs<T>, 1, static_cast<int>(a.size()), 0, static_cast<const std::uint32_t*>(first.data()),
             static_cast<const std::uint32_t*>(second.data()), larger.data());
  const std::vector<std::uint32_t> actual = larger.host();
  for (std::size_t n = 0; n < a.size(); ++n) {
    const double x = decode(dtype, a[n] >> 16);
    const double y = decode(dtype, a[n] & 0xffff);
    const double expected = std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y);
    for (const double got : {decode(dtype, actual[n] >> 16), decode(dtype, actual[n] & 0xffff)})
      EXPECT_TRUE(std::isnan(expected) ? std::isnan(got) : got == expected) << x << " and " << y << " give " << got;
  }
}

TEST_F(CudaWarpTest, MaxPairTakesTheLargerOfEachHalf) {
  expect_max_pairs<Float16>(DType::float16);
  expect_max_pairs<BFloat16>(DType::bfloat16);
}

/// The first warpgroup gives registers to the other two, which then hold kLive numbers each, more than a third of the
/// register file would allow.
constexpr int kLive = 200;
__global__ void __launch_bounds__(384, 1) reallocate(const float* x, float* y) {
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    ptx::give_registers<24>();
    y[threadIdx.x] = x[threadIdx.x];
    return;
  }
  ptx::take_registers<240>();
  float live[kLive];
#pragma unroll
  for (int i = 0; i < kLive; ++i) live[i] = x[i] * static_cast<float>(threadIdx.x);
  ptx::keep(live);
  float sum = 0;
#pragma unroll
  for (int i = kLive - 1; i >= 0; --i) sum = fmaf(sum, 0.5f, live[i]);
  y[threadIdx.x] = sum;
}

TEST_F(CudaWarpTest, WarpgroupsComputeInTheRegistersTheyTook) {
  std::vector<float> x(384);
  for (std::size_t n = 0; n < x.size(); ++n) x[n] = static_cast<float>(n % 13);
  const DeviceArray input = to_device(x, kGpu);
  const Results<float> y(384);
  run_kernel(reallocate, 1, 384, 0, static_cast<const float*>(input.data()), y.data());
  const std::vector<float> sums = y.host();
  for (int thread = 0; thread < 384; ++thread) {
    float expected = x[thread];
    if (thread >= 128) {
      expected = 0;
      for (int i = kLive - 1; i >= 0; --i) expected = std::fmaf(expected, 0.5f, x[i] * static_cast<float>(thread));
    }
    EXPECT_EQ(sums[thread], expected) << "thread " << thread;
  }
}

}  // namespace
}  // namespace flashcore::testing
