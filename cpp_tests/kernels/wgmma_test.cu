// Every generated wgmma shape: both element types, A from registers and from shared memory, B as [n][k] and as [k][n].
//
// The factors are small integers, so each product is exact in float32 and must come out equal, element by element. The
// tiles are laid out by plain indexing here; that the results land where the fragment map of ptx/wgmma.cuh says is part
// of the comparison.
#include <string>

#include "../support/float_formats.h"
#include "../support/random.h"
#include "gpu_test.cuh"
#include "kernels/ptx/barrier.cuh"
#include "kernels/ptx/warp.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flashcore::testing {
namespace {

using detail::BFloat16;
using detail::Float16;

constexpr int kM = 64;
constexpr int kK = 128;  // two panels: steps inside a panel and the step between them
constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 128;
constexpr int kABytes = kK / kPanelColumns * kM * kRowBytes;

__host__ __device__ constexpr int b_bytes(int n, bool transposed) {
  return transposed ? (n + kPanelColumns - 1) / kPanelColumns * kK * kRowBytes : kK / kPanelColumns * n * kRowBytes;
}

/// The fragment map.
__host__ __device__ constexpr int fragment_row(int thread, int e) {
  return thread / 32 * 16 + thread % 32 / 4 + 8 * (e >> 1 & 1);
}
__host__ __device__ constexpr int fragment_column(int thread, int e) { return 8 * (e >> 2) + 2 * (thread % 4) + e % 2; }

__device__ void copy_to_shared(unsigned char* s_target, const unsigned char* source, int bytes) {
  for (int n = static_cast<int>(threadIdx.x); n < bytes; n += static_cast<int>(blockDim.x)) s_target[n] = source[n];
}

/// d[thread][N/2] = A·B, started on accumulators full of NaN.
template <int N, class T, bool kARegisters, int kTransposeB>
__global__ void __launch_bounds__(128) multiply(const unsigned char* a_tile, const unsigned char* b_tile, float* d) {
  extern __shared__ __align__(1024) unsigned char s_memory[];
  copy_to_shared(s_memory, a_tile, kABytes);
  copy_to_shared(s_memory + kABytes, b_tile, b_bytes(N, kTransposeB));
  ptx::fence_proxy_async();
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  const std::uint32_t s_base = ptx::shared_address(s_memory);
  const std::uint64_t a = ptx::descriptor(s_base, 16);
  const std::uint64_t b = ptx::descriptor(s_base + kABytes, kTransposeB ? kK * kRowBytes : 16);

  std::uint32_t fragments[kK / 4];
#pragma unroll
  for (int i = 0; i < kK / 4; ++i) {  // pair i is elements 2i and 2i + 1 of an accumulator of A's shape
    const int row = fragment_row(thread, 2 * i);
    const int column = fragment_column(thread, 2 * i);
    const int line = column / kPanelColumns * kM + row;
    const int chunk = column % kPanelColumns / 8 ^ (row & 7);
    fragments[i] = *reinterpret_cast<const std::uint32_t*>(s_memory + line * kRowBytes + chunk * 16 + column % 8 * 2);
  }
  float products[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) products[i] = NAN;
  ptx::keep(fragments);
  ptx::keep(products);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) {
    const std::uint64_t b_step =
        kTransposeB ? b + step * (16 * kRowBytes >> 4) : b + step / 4 * (N * kRowBytes >> 4) + step % 4 * 2;
    if constexpr (kARegisters) {
      ptx::Wgmma<N, T>::template registers<kTransposeB>(products, fragments[4 * step], fragments[4 * step + 1],
                                                        fragments[4 * step + 2], fragments[4 * step + 3], b_step,
                                                        step > 0);
    } else {
      const std::uint64_t a_step = a + step / 4 * (kM * kRowBytes >> 4) + step % 4 * 2;
      ptx::Wgmma<N, T>::template shared<kTransposeB>(products, a_step, b_step, step > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::keep(products);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[thread * (N / 2) + i] = products[i];
}

/// A matrix of small integers, row by row.
struct Matrix {
  int rows;
  int columns;
  std::vector<int> values;

  int at(int row, int column) const { return values[static_cast<std::size_t>(row * columns + column)]; }
};

Matrix random_matrix(Random& random, int rows, int columns) {
  Matrix m{rows, columns, {}};
  for (int n = 0; n < rows * columns; ++n) m.values.push_back(static_cast<int>(random.integer(-8, 8)));
  return m;
}

/// The matrix in panels of 64 columns with 128-byte swizzle. What belongs to no element is NaN.
std::vector<unsigned char> tile_of(const Matrix& m, DType dtype) {
  const int panels = (m.columns + kPanelColumns - 1) / kPanelColumns;
  std::vector<unsigned char> tile(static_cast<std::size_t>(panels * m.rows * kRowBytes), 0xff);
  for (int row = 0; row < m.rows; ++row)
    for (int column = 0; column < m.columns; ++column) {
      const std::uint64_t bits = encode(dtype, m.at(row, column));
      const int line = column / kPanelColumns * m.rows + row;
      const int offset = swizzled(line * kRowBytes + column % kPanelColumns * 2, kRowBytes);
      tile[static_cast<std::size_t>(offset)] = static_cast<unsigned char>(bits);
      tile[static_cast<std::size_t>(offset + 1)] = static_cast<unsigned char>(bits >> 8);
    }
  return tile;
}

Matrix transposed(const Matrix& m) {
  Matrix t{m.columns, m.rows, {}};
  for (int row = 0; row < t.rows; ++row)
    for (int column = 0; column < t.columns; ++column) t.values.push_back(m.at(column, row));
  return t;
}

template <int N_, class T_>
struct Shape {
  static constexpr int kN = N_;
  using T = T_;
  static constexpr DType kDType = std::is_same_v<T_, Float16> ? DType::float16 : DType::bfloat16;
};

struct ShapeNames {
  template <class S>
  static std::string GetName(int) {
    return "n" + std::to_string(S::kN) + (S::kDType == DType::float16 ? "_fp16" : "_bf16");
  }
};

using Multiply = void (*)(const unsigned char* a_tile, const unsigned char* b_tile, float* d);

void expect_exact_products(Multiply kernel, int n, DType dtype, bool columns_of_b) {
  Random random(static_cast<std::uint64_t>(n));
  const Matrix a = random_matrix(random, kM, kK);
  const Matrix b = random_matrix(random, kK, n);
  const DeviceArray a_tile = to_device(tile_of(a, dtype), kGpu);
  const DeviceArray b_tile = to_device(tile_of(columns_of_b ? b : transposed(b), dtype), kGpu);
  const Results<float> result(static_cast<std::size_t>(kM * n));
  run_kernel(kernel, 1, 128, kABytes + b_bytes(n, columns_of_b), static_cast<const unsigned char*>(a_tile.data()),
             static_cast<const unsigned char*>(b_tile.data()), result.data());
  const std::vector<float> d = result.host();
  int wrong = 0;
  for (int thread = 0; thread < 128; ++thread)
    for (int e = 0; e < n / 2; ++e) {
      const int row = fragment_row(thread, e);
      const int column = fragment_column(thread, e);
      double exact = 0;
      for (int k = 0; k < kK; ++k) exact += a.at(row, k) * b.at(k, column);
      const float actual = d[static_cast<std::size_t>(thread * (n / 2) + e)];
      if (actual == exact) continue;
      if (++wrong <= 3) ADD_FAILURE() << "(" << row << ", " << column << "): " << actual << " instead of " << exact;
    }
  EXPECT_EQ(wrong, 0) << "of " << kM * n;
}

template <class S>
class CudaWgmmaTest : public HopperTest {
 protected:
  template <bool kARegisters, int kTransposeB>
  void expect_exact() {
    expect_exact_products(multiply<S::kN, typename S::T, kARegisters, kTransposeB>, S::kN, S::kDType, kTransposeB != 0);
  }
};

using Shapes = ::testing::Types<Shape<32, Float16>, Shape<64, Float16>, Shape<80, Float16>, Shape<96, Float16>,
                                Shape<112, Float16>, Shape<128, Float16>, Shape<176, Float16>, Shape<192, Float16>,
                                Shape<256, Float16>, Shape<32, BFloat16>, Shape<64, BFloat16>, Shape<80, BFloat16>,
                                Shape<96, BFloat16>, Shape<112, BFloat16>, Shape<128, BFloat16>, Shape<176, BFloat16>,
                                Shape<192, BFloat16>, Shape<256, BFloat16>>;
TYPED_TEST_SUITE(CudaWgmmaTest, Shapes, ShapeNames);

TYPED_TEST(CudaWgmmaTest, SharedAByRowsOfB) { this->template expect_exact<false, 0>(); }
TYPED_TEST(CudaWgmmaTest, SharedAByColumnsOfB) { this->template expect_exact<false, 1>(); }
TYPED_TEST(CudaWgmmaTest, RegistersByRowsOfB) { this->template expect_exact<true, 0>(); }
TYPED_TEST(CudaWgmmaTest, RegistersByColumnsOfB) { this->template expect_exact<true, 1>(); }

/// A·A[0:64]ᵀ and then A·A[0:64]ᵀ twice over, in two groups: the first is read while the second may still run.
__global__ void __launch_bounds__(128) two_groups(const unsigned char* a_tile, float* first_out, float* second_out) {
  extern __shared__ __align__(1024) unsigned char s_memory[];
  copy_to_shared(s_memory, a_tile, kABytes);
  ptx::fence_proxy_async();
  __syncthreads();
  const std::uint64_t a = ptx::descriptor(ptx::shared_address(s_memory), 16);
  const auto panel_step = [&](int step) { return a + step / 4 * (kM * kRowBytes >> 4) + step % 4 * 2; };
  float first[32];
  float second[32];
  ptx::keep(first);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kK / 16; ++step)
    ptx::Wgmma<64, Float16>::shared<0>(first, panel_step(step), panel_step(step), step > 0);
  ptx::wgmma_commit();
  ptx::keep(first);
  ptx::keep(second);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2 * kK / 16; ++step)
    ptx::Wgmma<64, Float16>::shared<0>(second, panel_step(step % 8), panel_step(step % 8), step > 0);
  ptx::wgmma_commit();
  ptx::keep(second);
  ptx::wgmma_wait<1>();
  ptx::keep(first);
#pragma unroll
  for (int i = 0; i < 32; ++i) first_out[threadIdx.x * 32 + i] = first[i];
  ptx::wgmma_wait<0>();
  ptx::keep(second);
#pragma unroll
  for (int i = 0; i < 32; ++i) second_out[threadIdx.x * 32 + i] = second[i];
}

class CudaWgmmaGroupTest : public HopperTest {};

TEST_F(CudaWgmmaGroupTest, AWaitLeavesTheYoungerGroupRunning) {
  Random random(5);
  const Matrix a = random_matrix(random, kM, kK);
  const DeviceArray a_tile = to_device(tile_of(a, DType::float16), kGpu);
  const Results<float> first(128 * 32);
  const Results<float> second(128 * 32);
  run_kernel(two_groups, 1, 128, kABytes, static_cast<const unsigned char*>(a_tile.data()), first.data(),
             second.data());
  std::vector<float> once;
  std::vector<float> twice;
  for (int thread = 0; thread < 128; ++thread)
    for (int e = 0; e < 32; ++e) {
      double exact = 0;
      for (int k = 0; k < kK; ++k) exact += a.at(fragment_row(thread, e), k) * a.at(fragment_column(thread, e), k);
      once.push_back(static_cast<float>(exact));
      twice.push_back(static_cast<float>(2 * exact));
    }
  EXPECT_EQ(first.host(), once);
  EXPECT_EQ(second.host(), twice);
}

}  // namespace
}  // namespace flashcore::testing
