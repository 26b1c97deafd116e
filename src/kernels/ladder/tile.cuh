// What both rungs build on: the types of WMMA, the keys that a tile of queries sees, and tiles on their way between
// strided tensors and shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include <cstdint>
#include <type_traits>

#include "../semantics.h"
#include "../tile/mask.cuh"
#include "../tile/reduce.cuh"
#include "../tile/softmax.cuh"
#include "../tile/vector.cuh"

namespace flashcore::ladder {

namespace wmma = nvcuda::wmma;

using detail::Params;
using detail::TensorParams;
using tile::Vector;

// ---- WMMA -----------------------------------------------------------------------------------------------------------

/// WMMA multiplies 16×16 tiles, a warp together. Which lane holds which element is the compiler's secret.
inline constexpr int kSide = 16;
/// A tile in memory begins on a multiple of so many bytes, or WMMA may not load it.
inline constexpr int kAlignment = 32;

/// WMMA's own name for the same 16 bits.
template <class T>
using Element = std::conditional_t<std::is_same_v<T, detail::Float16>, __half, __nv_bfloat16>;

/// A tile of the left factor, row after row.
template <class T>
using Left = wmma::fragment<wmma::matrix_a, kSide, kSide, kSide, Element<T>, wmma::row_major>;
/// A tile of the right factor, row after row.
template <class T>
using Right = wmma::fragment<wmma::matrix_b, kSide, kSide, kSide, Element<T>, wmma::row_major>;
/// A tile of the right factor that lies in memory transposed: the keys, of which a product with Kᵀ is wanted.
template <class T>
using RightTransposed = wmma::fragment<wmma::matrix_b, kSide, kSide, kSide, Element<T>, wmma::col_major>;
/// A tile of sums. They are float whatever the factors are.
using Sums = wmma::fragment<wmma::accumulator, kSide, kSide, kSide, float>;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kKnowsBFloat16 = false;
#else
inline constexpr bool kKnowsBFloat16 = true;
#endif
/// Before compute capability 8.0 kernels for bfloat16 have no body; the table refuses to start them.
template <class T>
inline constexpr bool kHasBody = kKnowsBFloat16 || !std::is_same_v<T, detail::BFloat16>;

template <class Fragment, class T>
__device__ void load_tile(Fragment& tile, const T* first, int pitch) {
  wmma::load_matrix_sync(tile, reinterpret_cast<const Element<T>*>(first), static_cast<unsigned>(pitch));
}

// ---- which rows and keys --------------------------------------------------------------------------------------------

/// One head of one batch element.
struct Head {
  std::int64_t batch;
  std::int64_t q;
  std::int64_t k;  // whose keys it sees
};

/// Heads are counted batch by batch.
inline __device__ Head head_of(const Params& p, int index) {
  const std::int64_t batch = index / p.size.heads_q;
  const std::int64_t head = index - batch * p.size.heads_q;
  return {batch, head, head / (p.size.heads_q / p.size.heads_k)};
}

template <class T>
__device__ T* rows_of(const TensorParams& t, std::int64_t batch, std::int64_t head) {
  return static_cast<T*>(t.data) + batch * t.batch + head * t.head;
}

/// Query i sees the keys [0, visible_end).
inline __device__ int visible_end(const Params& p, int i) {
  const auto seqlen_k = static_cast<int>(p.size.seqlen_k);
  const int shift = p.position.top_left ? 0 : seqlen_k - static_cast<int>(p.size.seqlen_q);
  return tile::KeyWindow{seqlen_k, shift, -1, p.position.causal ? 0 : -1}.end(i);
}

/// No query of the tile [first, first + rows) sees a key from here on: later queries see more.
inline __device__ int tile_end(const Params& p, int first, int rows) {
  return visible_end(p, min(first + rows, static_cast<int>(p.size.seqlen_q)) - 1);
}

// ---- tiles on their way ---------------------------------------------------------------------------------------------

/// Some rows of a tensor on their way to shared memory, in the registers of a block's threads: fetched early, put down
/// late, with work in between while memory answers.
template <class T, int kThreads, int kRows, int kColumns>
struct RowsInFlight {
  static constexpr int kVectors = kColumns / Vector<T>::kSize;  // of a row
  static constexpr int kParts = kRows * kVectors / kThreads;    // of a thread
  static_assert(kParts * kThreads == kRows * kVectors, "every thread carries as much");
  Vector<T> part[kParts];

  __device__ static int row(int n) { return (n * kThreads + static_cast<int>(threadIdx.x)) / kVectors; }
  __device__ static int column(int n) {
    return (n * kThreads + static_cast<int>(threadIdx.x)) % kVectors * Vector<T>::kSize;
  }

  /// Rows [first, first + kRows), counted from `rows`. Those from `count` on become zeros: nothing beyond the tensor is
  /// read, and nothing there (NaN, perhaps) meets a product.
  __device__ void fetch(const T* rows, std::int64_t stride, int first, int count) {
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      part[n] = {};
      if (first + row(n) < count)
        part[n] = *reinterpret_cast<const Vector<T>*>(rows + (first + row(n)) * stride + column(n));
    }
  }

  template <int kPitch>
  __device__ void put(T (&s_rows)[kRows][kPitch]) const {
#pragma unroll
    for (int n = 0; n < kParts; ++n) *reinterpret_cast<Vector<T>*>(&s_rows[row(n)][column(n)]) = part[n];
  }
};

/// Without work in between.
template <int kThreads, int kColumns, class T, int kRows, int kPitch>
__device__ void stage_rows(T (&s_rows)[kRows][kPitch], const T* rows, std::int64_t stride, int first, int count) {
  RowsInFlight<T, kThreads, kRows, kColumns> carried;
  carried.fetch(rows, stride, first, count);
  carried.put(s_rows);
}

/// The way back: rounds finished rows and writes those before `count`. Marks each strip of 16 rows that holds a value
/// which is not finite: a NaN in the value of an excluded key may have come in as 0 · NaN.
template <int kThreads, int kColumns, class T, int kRows, int kPitch>
__device__ void store_rows(const float (&s_rows)[kRows][kPitch], T* head, std::int64_t stride, int first, int count,
                           int (&s_spoilt)[kRows / kSide]) {
  constexpr int kVectors = kColumns / Vector<T>::kSize;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kThreads) {
    const int row = i / kVectors;
    const int at = i % kVectors * Vector<T>::kSize;
    if (first + row >= count) break;  // and so are all that follow
    Vector<T> rounded;
    bool finite = true;
    for (int n = 0; n < Vector<T>::kSize; ++n) {
      const float x = s_rows[row][at + n];
      finite = finite && fabsf(x) < INFINITY;
      detail::store(rounded.x[n], x);
    }
    *reinterpret_cast<Vector<T>*>(head + (first + row) * stride + at) = rounded;
    if (!finite) atomicOr(&s_spoilt[row / kSide], 1);
  }
}

}  // namespace flashcore::ladder
