// out = a + b: vectors of 16 bytes where all three arrays are dense and aligned, element by element elsewhere.
#include "../../cuda/launch.cuh"
#include "../tile/vector.cuh"
#include "arrays.h"
#include "common.h"

namespace flashcore::common {
namespace {

using detail::ArrayParams;
using tile::kVectorBytes;
using tile::Vector;

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // vectors of each array that a thread asks for before it waits for the first

template <class T>
__device__ T sum_of(T a, T b) {
  T sum;
  detail::store(sum, detail::load(a) + detail::load(b));
  return sum;
}

template <class T>
__device__ Vector<T> sum_of(const Vector<T>& a, const Vector<T>& b) {
  Vector<T> sum;
  for (int n = 0; n < Vector<T>::kSize; ++n) sum.x[n] = sum_of(a.x[n], b.x[n]);
  return sum;
}

/// The first count / kSize vectors, then the few elements that are left. `out` may be `a` or `b`: what a thread
/// overwrites it has read.
template <class T>
__global__ void __launch_bounds__(kThreads) add_dense_kernel(const T* a, const T* b, T* out, std::int64_t count) {
  const std::int64_t vectors = count / Vector<T>::kSize;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads * kAtOnce;
  for (std::int64_t first = blockIdx.x * std::int64_t{kThreads * kAtOnce} + threadIdx.x; first < vectors;
       first += step) {
    Vector<T> x[kAtOnce];
    Vector<T> y[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n * kThreads >= vectors) continue;
      x[n] = reinterpret_cast<const Vector<T>*>(a)[first + n * kThreads];
      y[n] = reinterpret_cast<const Vector<T>*>(b)[first + n * kThreads];
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (first + n * kThreads < vectors) reinterpret_cast<Vector<T>*>(out)[first + n * kThreads] = sum_of(x[n], y[n]);
  }
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t thread = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  for (std::int64_t i = vectors * Vector<T>::kSize + thread; i < count; i += threads) out[i] = sum_of(a[i], b[i]);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_strided_kernel(const __grid_constant__ ArrayParams a, const __grid_constant__ ArrayParams b,
                       const __grid_constant__ ArrayParams out, std::int64_t count) {
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < count; i += threads) {
    const T x = static_cast<const T*>(a.data)[offset_of(a, i)];
    const T y = static_cast<const T*>(b.data)[offset_of(b, i)];
    static_cast<T*>(out.data)[offset_of(out, i)] = sum_of(x, y);
  }
}

bool is_dense_and_aligned(const ArrayParams& a) {
  const bool dense = a.rank == 0 || (a.rank == 1 && a.stride[0] == 1);
  return dense && reinterpret_cast<std::uintptr_t>(a.data) % kVectorBytes == 0;
}

template <class T>
void launch_as(const ArrayParams& a, const ArrayParams& b, const ArrayParams& out, Stream stream) {
  const std::int64_t count = element_count(out);
  if (is_dense_and_aligned(a) && is_dense_and_aligned(b) && is_dense_and_aligned(out)) {
    cuda::launch("starting the dense addition kernel", add_dense_kernel<T>,
                 cuda::blocks_for(count, kThreads * kAtOnce * Vector<T>::kSize), kThreads, stream,
                 static_cast<const T*>(a.data), static_cast<const T*>(b.data), static_cast<T*>(out.data), count);
  } else {
    cuda::launch("starting the strided addition kernel", add_strided_kernel<T>, cuda::blocks_for(count, kThreads),
                 kThreads, stream, a, b, out, count);
  }
}

}  // namespace

void vector_add(const ArrayParams& a_given, const ArrayParams& b_given, const ArrayParams& out_given, int index,
                Stream stream) {
  const cuda::DeviceGuard guard(index);
  ArrayParams a = a_given;
  ArrayParams b = b_given;
  ArrayParams out = out_given;
  collapse<3>({&a, &b, &out});
  switch (out.dtype) {
    case DType::float16:
      return launch_as<detail::Float16>(a, b, out, stream);
    case DType::bfloat16:
      return launch_as<detail::BFloat16>(a, b, out, stream);
    case DType::float64:
      return launch_as<double>(a, b, out, stream);
    default:
      return launch_as<float>(a, b, out, stream);
  }
}

}  // namespace flashcore::common
