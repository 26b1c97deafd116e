// Sums and maxima over a warp or a block, in a fixed order: the same input gives the same bits.
#pragma once

#include <cstdint>

namespace flashcore::tile {

inline constexpr int kWarpSize = 32;

struct Sum {
  template <class T>
  static __device__ T identity() {
    return T(0);
  }
  template <class T>
  static __device__ T combine(T a, T b) {
    return a + b;
  }
};

/// The larger of two; NaN if either is NaN, which fmax would hide.
struct Max {
  template <class T>
  static __device__ T identity() {
    return -T(INFINITY);
  }
  template <class T>
  static __device__ T combine(T a, T b) {
    return a > b || a != a ? a : b;
  }
};

struct Min {
  template <class T>
  static __device__ T identity() {
    return T(INFINITY);
  }
  template <class T>
  static __device__ T combine(T a, T b) {
    return a < b || a != a ? a : b;
  }
};

/// Every lane of a full warp gets the result.
template <class Op, class T>
__device__ T warp_reduce(T x) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2)
    x = Op::template combine<T>(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

/// Every thread of the block gets the result. `s_partial` holds one T per warp. All threads must call; the block is
/// synchronised before s_partial is written and before the result is returned.
template <class Op, int kThreads, class T>
__device__ T block_reduce(T x, T* s_partial) {
  static_assert(kThreads % kWarpSize == 0, "whole warps only");
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  x = warp_reduce<Op>(x);
  __syncthreads();  // s_partial may still be read from the last call
  if (threadIdx.x % kWarpSize == 0) s_partial[warp] = x;
  __syncthreads();
  T result = Op::template identity<T>();
  for (int i = 0; i < kThreads / kWarpSize; ++i) result = Op::template combine<T>(result, s_partial[i]);
  return result;
}

}  // namespace flashcore::tile
